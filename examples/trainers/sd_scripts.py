"""kohya's sd-scripts, every row by its image's path. In its folder, with any of its training scripts:

    accelerate launch -m diffhook.run --log runs/mine sd_scripts.py sdxl_train_network.py --its --arguments

Its batches name their images in its debug mode only, and the option that turns that on shows images instead
of training: so each dataset is told that it is in that mode. Which images are for regularisation is added.
"""

import runpy
import sys
from pathlib import Path

sys.argv.pop(0)
sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))

from library.train_util import BaseDataset  # noqa: E402

make, batch_of = BaseDataset.__init__, BaseDataset.__getitem__


def make_with_names(dataset, *args, **kwargs):
    make(dataset, *args, **kwargs)
    dataset.debug_dataset = True  # batches then have image_keys


def batch_with_roles(dataset, index):
    batch = batch_of(dataset, index)
    if "image_keys" in batch:  # not while latents are cached
        batch["is_reg"] = [dataset.image_data[key].is_reg for key in batch["image_keys"]]
    return batch


BaseDataset.__init__, BaseDataset.__getitem__ = make_with_names, batch_with_roles
runpy.run_path(sys.argv[0], run_name="__main__")
