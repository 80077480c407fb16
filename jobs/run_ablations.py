"""The method beside rows that differ from it, each with several seeds: what is each part worth?

python jobs/run_ablations.py --config configs/ablations/demo.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.ablations import ablations_stage
from freesolo.config import AblationJob
from freesolo.entry import run_job

if __name__ == "__main__":
    sys.exit(run_job(AblationJob, "ablations", ablations_stage))
