"""Evaluate label sets against a data set's annotations, on the same images, and make the page that shows them.

python jobs/evaluate.py --config configs/evaluate/compare.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import EvaluateJob
from freesolo.entry import run_job
from freesolo.jobs import evaluate_stage

if __name__ == "__main__":
    sys.exit(run_job(EvaluateJob, "evaluation", evaluate_stage))
