"""Pack photos into the WebDataset shards that all jobs stream.

python jobs/pack_shards.py --config configs/pack/photos.yaml --run-name N --storage URL [k=v ...]
"""

import sys

from freesolo.config import PackJob
from freesolo.entry import run_job
from freesolo.jobs import pack_stage

if __name__ == "__main__":
    sys.exit(run_job(PackJob, "pack", pack_stage))
