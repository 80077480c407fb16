"""Find coarse object masks in every photo of a data set, the labels that SOLO is first trained on.

python jobs/extract_free_masks.py --config configs/extract/free_masks_r50.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import ExtractJob
from freesolo.entry import run_job
from freesolo.jobs import extract_stage

if __name__ == "__main__":
    sys.exit(run_job(ExtractJob, "free-masks", extract_stage))
