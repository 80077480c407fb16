"""Everything: pre-training, Free Masks, SOLO, rounds of self-training, evaluation, report and registry.

python jobs/run_pipeline.py --config configs/pipeline/demo.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import PipelineJob
from freesolo.entry import run_job
from freesolo.pipeline import pipeline_stage

if __name__ == "__main__":
    sys.exit(run_job(PipelineJob, "pipeline", pipeline_stage))
