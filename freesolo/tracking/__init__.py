"""MLflow as a witness: told what a run does, never waited for.

A run's own `metrics.jsonl` (`journal`) is the truth. A `witness.Witness` follows it: what is told it waits on disk
(`spool`) until a background thread (`courier`) has given it to the run on the server (`mlflow_run`), which is found
again by a note in the run's folder (`record`). `server` says which server that is.
"""
