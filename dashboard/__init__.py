"""The Streamlit dashboard: it draws values computed elsewhere."""
