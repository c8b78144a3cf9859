"""musubi-tuner, every row by its image's or video's name. In its folder, with any of its training scripts:

    accelerate launch -m diffhook.run --log runs/mine musubi.py qwen_image_train_network.py --its --arguments

Its batches hold no names, so its bucket manager is made to add them. Images of one name in two datasets are
told apart by the folders of their caches, by default those of the images. Where workers are spawned, as on
Windows, give it --max_data_loader_n_workers 0: they know nothing of what is changed here.
"""

import os
import runpy
import sys

from musubi_tuner.dataset.image_video_dataset import BucketBatchManager

batch_of = BucketBatchManager.__getitem__


def batch_with_names(manager, index):
    bucket, number = manager.bucket_batch_indices[index]
    items = manager.buckets[bucket][number * manager.batch_size :][: manager.batch_size]
    names = [os.path.join(os.path.dirname(item.latent_cache_path), item.item_key) for item in items]
    return batch_of(manager, index) | {"item_keys": names}


BucketBatchManager.__getitem__ = batch_with_names
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
