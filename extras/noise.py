"""Train each dispatch on noise: only a layer that reads what it predicts gets below ln V (python eval.py --noise)."""

import math

import torch

from model import Config, Decoder

V = 6
RUNS = [  # dispatch, experts, slots of each expert, T
    ("token", 4, 4, 12),
    ("causal", 4, 4, 12),
    *(("sequence", E, P, T) for T in (12, 48, 192) for E, P in ((4, 4), (4, 1), (1, 1))),
    ("sequence", 6, 1, 2048),
]


def noise_loss(config, steps=400, batch_tokens=1536, seed=0):
    """Train a Soft MoE on independent uniform tokens; returns the loss on fresh ones.

    A model that cannot read ahead stays at ln V or above.
    """
    torch.manual_seed(seed)
    model = Decoder(config)
    for block in model.blocks:  # no zero matrices and a sharp router at the start, as the training is short
        torch.nn.init.normal_(block.attention.out, std=config.d_model**-0.5)
        torch.nn.init.normal_(block.ffn.w_out, std=config.expert_width**-0.5)
        torch.nn.init.constant_(block.ffn.scale, 8.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)

    def loss_of_fresh_tokens():
        ids = torch.randint(config.vocab_size, (max(1, batch_tokens // config.block_size), config.block_size + 1))
        return model(ids[:, :-1], ids[:, 1:])

    for _ in range(steps):
        loss_of_fresh_tokens().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(loss_of_fresh_tokens().item() for _ in range(20)) / 20


def print_noise():
    print(f"loss on fresh uniform noise of {V} tokens; ln {V} = {math.log(V):.4f}, which no honest model can beat.")
    print("400 steps of 1,536 tokens (2,048 at T = 2048); trained for longer, a layer may read more than shown here.")
    print(f"{'dispatch':<10}{'slots':>7}{'T':>7}{'slots/T':>9}{'loss':>9}{'read, nats':>12}")
    width = dict(n_layer=2, d_model=64, n_head=4, n_kv_head=4)
    for dispatch, E, P, T in RUNS:
        config = Config(**width, vocab_size=V, block_size=T, dispatch=dispatch, n_expert=E, slots_per_expert=P)
        loss = noise_loss(config)
        slots = E * P
        row = f"{dispatch:<10}{slots:>7}{T:>7}{slots / T:>9.4f}{loss:>9.4f}{math.log(V) - loss:>12.4f}"
        print(row, flush=True)
