"""The dashboard: `streamlit run dashboard/app.py [-- --runs DIR]`. Navigation only; a page is a file in views/."""

from pathlib import Path

import streamlit as st

VIEWS = Path(__file__).parent / "views"

st.set_page_config(page_title="DETR ablation workbench", page_icon="⚖️", layout="wide")
st.navigation(
    {
        "Results": [
            st.Page(
                VIEWS / "studies.py", title="Studies", icon=":material/fact_check:", url_path="studies", default=True
            ),
            st.Page(VIEWS / "compare.py", title="Compare", icon=":material/compare_arrows:", url_path="compare"),
        ],
        "Trials": [st.Page(VIEWS / "runs.py", title="Runs", icon=":material/monitor_heart:", url_path="runs")],
    }
).run()
