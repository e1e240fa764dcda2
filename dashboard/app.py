"""The dashboard: `streamlit run dashboard/app.py [-- --runs DIR]`. Navigation, heading and choice of study.

A page is a file in views/. The study is chosen here because a choice made here stays when the page changes.
"""

from pathlib import Path

import streamlit as st

from dashboard import parts

VIEWS = Path(__file__).parent / "views"

st.set_page_config(page_title="DETR ablation workbench", page_icon="⚖️", layout="wide")
studies = st.Page(VIEWS / "studies.py", title="Studies", icon=":material/fact_check:", default=True)
compare = st.Page(VIEWS / "compare.py", title="Compare", icon=":material/compare_arrows:")
runs = st.Page(VIEWS / "runs.py", title="Runs", icon=":material/monitor_heart:")
if st.get_option("server.address") is None:  # our settings were not read, which lie in the repository's root
    how = "start it in the repository's root, or with `--server.address=127.0.0.1`"
    st.warning(f"Other machines can reach this page: {how}.")
questions = {studies: "What did we learn?", compare: "Which variants differ?", runs: "What is running?"}
page = st.navigation({"Results": [studies, compare], "Trials": [runs]})

st.title(questions[page], anchor=False)
if page != studies:
    parts.study_picker(parts.entries_or_stop())
page.run()
