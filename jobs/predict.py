"""Segment every photo of a data set: pseudo-labels for a next round of training, or predictions for their own sake.

python jobs/predict.py --config configs/predict/solo_r50.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import PredictJob
from freesolo.entry import run_job
from freesolo.jobs import predict_stage

if __name__ == "__main__":
    sys.exit(run_job(PredictJob, "predictions", predict_stage))
