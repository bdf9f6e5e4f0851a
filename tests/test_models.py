"""All six models, scaled down: each trains from its base, is merged, and trains on from the merged
file, at tp 1 and 2.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

import convert
import model as m
import tp
import train
from configs.smoke_drive import write_drive

ROOT = Path(__file__).parent.parent
MODELS = ["lidar", "hdmap", "mv_t2w_lidar", "mv_t2w_hdmap", "mv_v2w_lidar", "mv_v2w_hdmap"]
SMALL = [
    "model.model_channels=64",
    "model.num_heads=4",
    "model.num_blocks=3",
    "model.num_control_blocks=2",
    "model.adaln_lora_dim=16",
    "model.crossattn_emb_channels=64",
    "model.text_tokens=8",
    "model.max_img_h=32",
    "model.max_img_w=32",
    "data.num_frames=9",
    "data.height=32",
    "data.width=48",
    "trainer.logging_iter=3",
    "checkpoint.save_iter=3",
    "trainer.max_iter=3",
    "trainer.val_iter=0",
    f"tokenizer.path={ROOT / 'configs/smoke_tokenizer.safetensors'}",
]


def config(name, folder, tp_size, *words):
    return [
        str(ROOT / f"configs/{name}.yaml"),
        *SMALL,
        f"data.root={folder / 'drive'}",
        f"parallel.tp={tp_size}",
        *words,
    ]


def bases(folder):
    """Write a base checkpoint of each family under the released names."""
    for views, conditioning in ((1, None), (3, "t2w")):
        words = config(MODELS[0] if views == 1 else "mv_t2w_lidar", folder, 1)
        cfg = train.load_config(words[0], words[1:])
        net = m.build(cfg.model, "cpu", torch.bfloat16)
        tp.init_weights(net, views)
        tensors = {
            convert.to_nvidia(k).removeprefix("base_model."): v.contiguous()
            for k, v in net.state_dict().items()
            if not k.startswith("control.")
        }
        tensors["net.pos_embedder.seq"] = torch.arange(128.0)
        torch.save({"model": tensors, "ema": None}, folder / f"base_{views}.pt")


def train_all(folder, tp_size, stage):
    os.environ["OUTPUT_ROOT"] = str(folder / f"{stage}_tp{tp_size}")
    for name in MODELS:
        base = folder / f"base_{3 if name.startswith('mv') else 1}.pt"
        words = config(name + stage, folder, tp_size, f"checkpoint.base_path={base}")
        if stage:
            words.append(f"checkpoint.load_path={merged(folder, name, tp_size)}")
        assert train.main(words) == 0


def run_dir(folder, name, tp_size, stage=""):
    words = config(name + stage, folder, tp_size)
    relative = train.load_config(words[0], words[1:]).run_dir.relative_to(
        os.environ.get("OUTPUT_ROOT", "checkpoints")
    )
    return folder / f"{stage}_tp{tp_size}" / relative


def merged(folder, name, tp_size):
    return run_dir(folder, name, tp_size) / "fsdp_checkpoints/iter_000000003_reg_model.pt"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_six_models_both_ways(tmp_path, tp_size):
    write_drive(tmp_path / "drive", clips=2, frames=12, height=32, width=48, text_width=64)
    bases(tmp_path)
    launch = train_all if tp_size == 1 else functools.partial(run_ranks, tp_size, train_all)
    launch(tmp_path, tp_size, "")
    for name in MODELS:
        metadata = run_dir(tmp_path, name, tp_size) / "checkpoints/iter_000000003.pt"
        assert metadata.is_file()
        convert.merge(metadata)
    launch(tmp_path, tp_size, "_posttrain")
    for name in MODELS:
        before = torch.load(merged(tmp_path, name, tp_size), weights_only=True)
        metadata = run_dir(tmp_path, name, tp_size, "_posttrain") / "checkpoints/iter_000000003.pt"
        convert.merge(metadata)
        after = torch.load(
            metadata.parent.parent / "fsdp_checkpoints/iter_000000003_reg_model.pt",
            weights_only=True,
        )
        assert before.keys() == after.keys()
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert moved and all(
            (before[k].float() - after[k].float()).abs().max() < 0.02 for k in moved
        )
