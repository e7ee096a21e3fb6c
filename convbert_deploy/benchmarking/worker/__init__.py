"""What runs inside a candidate's own process: it loads one model and runs it when asked.

``python FOLDER`` starts it with any interpreter that has numpy. Nothing in here imports the rest of
the project, except ``engine``: a peer's environment holds the peer alone. Imports between these
files are relative, as the folder is ``convbert_deploy.benchmarking.worker`` for the parent and
``benchmark_worker`` for itself.
"""
