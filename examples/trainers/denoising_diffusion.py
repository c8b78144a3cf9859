"""denoising-diffusion-pytorch on a folder of images, every row by its file's path.

    python denoising_diffusion.py photos runs/mine

In a script of your own, `paths` and the hook are what to add between the Trainer and its `train()`.
"""

import argparse

from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

from diffhook.integrations.accelerate import DiffHook

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("log")
parser.add_argument("--size", type=int, default=128)
parser.add_argument("--dim", type=int, default=64)
parser.add_argument("--steps", type=int, default=100_000)
parser.add_argument("--save-every", type=int, default=1000)
parser.add_argument("--milestone", type=int, help="go on from results/model-N.pt")
args = parser.parse_args()

diffusion = GaussianDiffusion(Unet(dim=args.dim, dim_mults=(1, 2, 4)), image_size=args.size)
options = {"train_num_steps": args.steps, "save_and_sample_every": args.save_every, "calculate_fid": False}
trainer = Trainer(diffusion, args.folder, **options)
if args.milestone is not None:
    trainer.load(args.milestone)


def paths(batch, indices):
    return [str(trainer.ds.paths[index]) for index in indices.tolist()]


with DiffHook(trainer.accelerator, args.log, sample_ids=paths):
    trainer.train()
