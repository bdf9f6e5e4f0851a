"""data.root=random: clips of noise, already encoded, for benchmarks and tests."""

import numpy as np
import torch

from data import VIEWS


class RandomClips:
    """Noise in the form of CachedClips' samples."""

    held_out = ()

    def __init__(self, hint, num_frames, views, height, width, seed, text_tokens, text_width):
        latents = (16, views * ((num_frames - 1) // 8 + 1), height // 8, width // 8)
        self.seed, self.bad = seed, {}
        self.noise = {"latents": latents, "hint_latents": latents,
                      "text": (views * text_tokens, text_width)}
        self.fixed = {"fps": torch.tensor(10.0),
                      "padding_mask": torch.zeros(1, height, width, dtype=torch.bool),
                      "view_index": torch.tensor(list(VIEWS.values())[:views])}

    def __str__(self):
        return "random latents"

    def sample(self, n):
        """A function of the seed and n: latents and hint_latents (16, V*T, h, w), text, ..."""
        rng = np.random.default_rng([self.seed, n])
        drawn = {key: torch.from_numpy(rng.standard_normal(shape, np.float32))
                 for key, shape in self.noise.items()}
        return drawn | self.fixed

    held = sample

    def shown(self, i):
        return self.held(i)

    def survey(self, max_bad):
        pass
