"""Makes configs/smoke_base.safetensors, the frozen text-to-video base of configs/smoke.yaml.

    python -m configs.smoke_base configs/smoke_base.safetensors --device cuda

It sees videos and texts of made-up drives, never a control video: it takes colours from the text
and makes up everything else. The committed file took two and a half minutes on an H100. It saw
drives of more cars and colours than those of today.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import convert
import data
import model as m
import tp
from configs.schema import load_config
from configs.smoke_drive import write_drives
from tokenizer import load_tokenizer

CLIP_FRAMES = 33


@torch.no_grad()
def encode(roots, cfg, tokenizer):
    """Latents (N, 16, T, H, W) of windows of each clip and their mirror images, and their texts."""
    frames, size = cfg.data.num_frames, cfg.model
    starts = range(0, CLIP_FRAMES - frames + 1, 8)

    def read(file):
        video = torch.from_numpy(data.decode(file, 0, CLIP_FRAMES)).permute(3, 0, 1, 2)
        windows = torch.stack([video[:, start:start + frames] for start in starts])
        text = file.parents[2] / "t5_xxl" / file.parent.name / f"{file.stem.rpartition('_')[0]}.pkl"
        return windows, data.load_text(text, size.text_tokens, size.crossattn_emb_channels)

    device, latents, texts = tokenizer.quant_conv.conv3d.weight.device, [], []
    files = sorted(file for root in roots for file in root.glob("videos/pinhole_front/*.mp4"))
    for windows, text in data.prefetch(read, files, 16, depth=100):
        windows = torch.cat([windows, windows.flip(-1)]).to(device) / 127.5 - 1    # (n, 3, F, H, W)
        latents.append(tokenizer.normalise(tokenizer.encode(windows)))
        texts += [text] * len(windows)
    return torch.cat(latents), torch.stack(texts).to(device)


def captured(step):
    """`step` as one CUDA graph where there is a GPU: its thousand small kernels cost one launch."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def rise_and_fall(part):
    """The learning rate at this part of the run, between 0 and 1: a line up, then a cosine down."""
    return part / 0.1 if part < 0.1 else (1 + math.cos(math.pi * (part - 0.1) / 0.9)) / 2


def train(cfg, latents, texts, steps, batch, lr):
    """A model whose base and logvar are trained by the objective of train.py, without control."""
    device, (height, width) = latents.device, (cfg.data.height, cfg.data.width)
    model = m.build(cfg.model, device, torch.float32)
    tp.init_weights(model, cfg.trainer.seed)
    model.logvar.freqs.copy_(2 * math.pi * torch.randn(128))
    trained = [*model.base.requires_grad_().parameters(), model.logvar.weight.requires_grad_()]
    rate = torch.tensor(0.0, device=device)  # a tensor, since a captured step reads it anew
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.99), weight_decay=0.01,
                                  capturable=device.type == "cuda")
    fps = torch.full((batch,), 10.0, device=device)
    padding_mask = torch.zeros(1, 1, height, width, dtype=torch.bool, device=device)
    recent = torch.zeros((), device=device)

    def update():
        some = torch.randint(len(latents), (batch,), device=device)
        # More of the low noise levels than train.py draws: they are what makes a sample clean.
        sigma = (1.2 * torch.randn(batch, device=device) - 0.4).exp() * math.sqrt(latents.shape[2])
        eps = torch.randn(latents[some].shape, device=device)
        noise = m.Noise(sigma, eps, torch.rand(batch, device=device) >= 0.2)
        cond = m.Condition(texts[some], fps, padding_mask)
        with torch.autocast(device.type, torch.bfloat16):
            loss = m.training_loss(model, latents[some], cond, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        recent.add_(loss.detach() / 100)

    replay = captured(update)
    for step in range(steps):
        rate.fill_(lr * rise_and_fall(step / steps))
        replay()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {recent.item():.4f}", flush=True)
            recent.zero_()
    return model


def save(cfg, model, path):
    """Under the released names, bfloat16 but for the few numbers of logvar."""
    size = cfg.model
    largest = max(size.max_img_h // 2, size.max_img_w // 2, size.max_frames)
    tensors = {convert.SEQ: torch.arange(largest).float()}
    for name, tensor in model.state_dict().items():
        if not name.startswith("control."):
            dtype = torch.float32 if name.startswith("logvar.") else torch.bfloat16
            theirs = convert.to_nvidia(name).removeprefix("base_model.")
            tensors[theirs] = tensor.detach().to("cpu", dtype).contiguous()
    save_file(tensors, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", default="configs/smoke.yaml")
    parser.add_argument("--drives", type=int, default=26, help="64 clips each")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    cfg = load_config(args.config)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        roots = write_drives(folder, args.drives, CLIP_FRAMES, cfg, first_seed=2000)
        tokenizer = load_tokenizer(cfg.tokenizer.path, args.device, torch.float32, compile=False)
        latents, texts = encode(roots, cfg, tokenizer)
    print(f"{len(latents)} windows of {tuple(latents.shape[1:])} latents")
    save(cfg, train(cfg, latents, texts, args.steps, args.batch, args.lr), args.out)


if __name__ == "__main__":
    main()
