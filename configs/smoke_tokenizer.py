"""Makes configs/smoke_tokenizer.safetensors, the small autoencoder of configs/smoke.yaml.

    python -m configs.smoke_tokenizer configs/smoke_tokenizer.safetensors --device cuda

The committed file took two and a half minutes on an H100. It saw drives of more cars and
colours than those of today.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from configs.schema import load_config
from configs.smoke_drive import write_drives
from data import decode, prefetch
from tokenizer import Attention, CausalConv, Down, ResBlock, Tokenizer, Up

CLIP_FRAMES, WINDOW, COLUMNS = 33, 17, 16
BRANCHES = {ResBlock: ["conv2.1"], Attention: ["proj_out"], Down: ["conv1", "conv2"],
            Up: ["conv1", "conv2"]}


@torch.no_grad()
def start_as_a_blur(tokenizer, video):
    """At first the latent is close to the mean colour of its 8x8x8 pixels: all else adds detail.

    Residual branches are zero, the straight path copies channels, and both SiLUs on it work where
    they are straight.
    """
    straight = [conv for net in (tokenizer.encoder, tokenizer.decoder)
                for conv in (*net.conv_in, *net.conv_out)]
    for module in tokenizer.modules():
        if not isinstance(module, CausalConv):
            continue
        weight = module.conv3d.weight.data
        if module in straight or weight.shape[2:] == (1, 1, 1):
            centre = weight.shape[3] // 2
            copy = torch.eye(*weight.shape[:2], device=weight.device)
            weight.mul_(0.03)[:, :, -1, centre, centre] += copy
    for module in tokenizer.modules():
        for name in BRANCHES.get(type(module), []):
            nn.init.zeros_(module.get_submodule(name).conv3d.weight)
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    ends = (encoder, encoder.mid.block_2), (decoder, decoder.up[-1].block[-1])
    for network, last_block in ends:
        # The bias outweighs the signal, whose scale the norm then keeps.
        bias = last_block.conv2[1].conv3d.bias.data
        bias[0::2] = 1.0
        bias[1::2] = -1.0
        nn.init.constant_(network.norm_out.norm.bias, 2.0)
    tokenizer.quant_conv.conv3d.bias -= tokenizer.encode(video).mean((0, 2, 3, 4))
    bands = decoder[:-1](tokenizer.post_quant_conv(tokenizer.encode(video)))
    decoder.conv_out[1].conv3d.bias += (encoder.patcher3d(video) - bands).mean((0, 2, 3, 4))


def windows(videos, step, steps, batch):
    """A training batch in [-1,1], colours swapped: quarter pictures, and whole ones at the end."""
    batch, cut = (batch, 2) if step < 0.75 * steps else (batch // 2, 1)
    sizes = (WINDOW, videos.shape[3] // cut, videos.shape[4] // cut)
    t, y, x = (int(torch.randint(n - s + 1, ())) for n, s in zip(videos.shape[2:], sizes))
    some = torch.randint(len(videos), (batch,))
    video = videos[some, :, t:t + sizes[0], y:y + sizes[1], x:x + sizes[2]]
    return video[:, torch.randperm(3)] / 127.5 - 1


def train(videos, steps, channels, batch):
    """A Tokenizer (float32) trained on uint8 (N,3,F,H,W)."""
    tokenizer = Tokenizer(channels).to(videos.device)
    start_as_a_blur(tokenizer, videos[:: len(videos) // 30 + 1, :, :WINDOW] / 127.5 - 1)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.99), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, steps, pct_start=0.2)
    recent = 0.0
    for step in range(steps):
        video = windows(videos, step, steps, batch)
        error = tokenizer.decode(tokenizer.encode(video)) - video
        optimizer.zero_grad()
        (error.abs().mean() + 5 * error.square().mean()).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += error.square().mean().item() / 50
        if step % 50 == 49:
            print(f"step {step + 1}: {10 * math.log10(4 / recent):.1f} dB", flush=True)
            recent = 0.0
    return tokenizer


@torch.no_grad()
def save(tokenizer, videos, path):
    """Writes bfloat16 weights and the statistics of each latent frame, the last one's repeated."""
    some = videos[::len(videos) // 200 + 1].split(1)
    latents = torch.cat([tokenizer.encode(video / 127.5 - 1) for video in some])
    columns = torch.arange(COLUMNS).clamp(max=latents.shape[2] - 1)
    std, mean = (s.cpu()[:, columns].contiguous() for s in torch.std_mean(latents, dim=(0, 3, 4)))
    tensors = {name: t.bfloat16().cpu() for name, t in tokenizer.state_dict().items()}
    tensors |= {"mean": mean, "std": std}
    channels = len(tensors["encoder.conv_in.0.conv3d.weight"])
    save_file(tensors, path, {"config": json.dumps({"channels": channels})})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/smoke.yaml")
    parser.add_argument("--drives", type=int, default=8, help="64 clips each")
    parser.add_argument("--steps", type=int, default=707)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cfg = load_config(args.config)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        roots = write_drives(folder, args.drives, CLIP_FRAMES, cfg, first_seed=1000)
        files = sorted(file for root in roots for file in root.glob("*/*/*.mp4"))
        videos = prefetch(lambda file: torch.from_numpy(decode(file, 0, CLIP_FRAMES)), files, 16)
        videos = torch.stack(list(videos)).movedim(-1, 1).to(args.device)              # (N,3,F,H,W)
    save(train(videos, args.steps, args.channels, args.batch), videos, args.out)


if __name__ == "__main__":
    main()
