"""The walk through an encoder: stage by stage, block by block, each layer solved on what the student gives so far."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transkd.models.encoders.mit import to_map, to_tokens
from transkd.models.inherit.activations import Activations, Batch
from transkd.models.inherit.families import Attention, Block, FeedForward, Stage
from transkd.models.inherit.fits import fit_linear, fit_norm, Gram
from transkd.models.inherit.subspaces import *
from transkd.models.inherit.subspaces import value_factors, X

__all__ = ["Settings", "solve_encoder"]


@dataclass(frozen=True)
class Settings:
    ridge: float
    generator: torch.Generator
    advance: Callable[[], None]


def solve_encoder(teacher: list[Stage], student: list[Stage], batches: Activations, settings: Settings) -> list[Tensor]:
    """Solve all stages; the batches know "teacher_0" and "student_0", the normalised image.

    Leaves the features "teacher_1" … and "student_1" … with the batches, and returns the maps [C_s, C_t] by which the
    teacher's features are about the student's.
    """
    like = teacher[0].embed.weight
    reader = torch.eye(like.shape[1], device=like.device)
    readers = []
    for i, (theirs, ours) in enumerate(zip(teacher, student, strict=True)):
        basis = stage_basis(theirs, ours, batches, i, settings)
        solve_embedding(theirs, ours, basis, reader, batches, i, settings)
        settings.advance()
        depth, first = len(ours.blocks), 0
        for j, block in enumerate(ours.blocks):
            last = (j + 1) * len(theirs.blocks) // depth
            solve_block(theirs.blocks[first:last], block, basis, batches, settings)
            first = last
            settings.advance()
        fit_norm(batches, ours.norm, lambda b: b["student"], lambda b: basis.normed(theirs.norm, b["teacher"]))
        if not basis.identity and X.get("bias", 1):
            reader_ = basis.reader(theirs.norm)
            ours.norm.bias.add_(torch.linalg.lstsq(reader_.T.double(), theirs.norm.bias.double()[:, None]).solution[:, 0].float())
        reader = basis.reader(theirs.norm)
        readers.append(reader)
        batches.define(
            feature_t=lambda b: to_map(theirs.norm(b["teacher"]), b["grid"]),
            feature_s=lambda b: to_map(ours.norm(b["student"]), b["grid"]),
        )
        batches.store(**{f"teacher_{i + 1}": "feature_t", f"student_{i + 1}": "feature_s"})
        if "log" in X:
            g = Gram()
            for b in batches: g.add(b[f"student_{i+1}"], b[f"teacher_{i+1}"])
            w, bb = g.solve(1e-9); xx, xy, yy = g.centred()
            X["log"](f"stage {i+1}: unexplained {float(1-(w*xy.T).sum()/yy.sum()):.4f}")
    return readers


def stage_basis(theirs: Stage, ours: Stage, batches: Activations, i: int, settings: Settings) -> Basis:
    """The basis of a stage's stream."""
    if theirs.width == ours.width:
        return identity_basis(theirs.width, theirs.norm.weight)
    moments, n = 0.0, 0
    def see(x, w):
        nonlocal moments, n
        x = F.layer_norm(x, x.shape[-1:]).flatten(0, 1).double()
        if X.get("centre", 0): x = x - x.mean(0)
        moments = moments + w * (x.T @ x); n += len(x)
    wf = X.get("wf", 1.0)
    for batch in batches:
        embedded = theirs.embed(batch[f"teacher_{i}"])
        grid = tuple(embedded.shape[-2:])
        tokens = theirs.embed_norm(to_tokens(embedded))
        for block in theirs.blocks:
            see(tokens, 1.0)
            tokens = block.attend(tokens, grid)
            see(tokens, 1.0)
            tokens = block.feed(tokens, grid)
        see(tokens, wf * 2 * len(theirs.blocks))
    return principal_basis(moments / n, ours.width, settings.generator)


def solve_embedding(theirs, ours, basis, reader, batches, i, settings) -> None:
    norm = theirs.embed_norm
    def target(b):
        raw = to_tokens(theirs.embed(b[f"teacher_{i}"]))
        if basis.identity:
            return raw
        return (raw - raw.mean(-1, keepdim=True)) * norm.weight @ basis.down
    def weight(b):
        return to_tokens(theirs.embed(b[f"teacher_{i}"])).var(-1).add(norm.eps).reciprocal()
    prior = torch.einsum("ochw,dc->odhw", theirs.embed.weight, reader)
    if not basis.identity:
        w = prior - prior.mean(0)
        prior = torch.einsum("ochw,o,op->pchw", w, norm.weight, basis.down)
    fit_linear(batches, ours.embed, lambda b: b[f"student_{i}"], target, settings.ridge, prior, weight if X.get("we", 1) else None)
    batches.define(
        teacher=lambda b: norm(to_tokens(theirs.embed(b[f"teacher_{i}"]))),
        raw=lambda b: ours.embed(b[f"student_{i}"]),
        grid=lambda b: tuple(b["raw"].shape[-2:]),
        student=lambda b: ours.embed_norm(to_tokens(b["raw"])),
    )
    fit_norm(batches, ours.embed_norm, lambda b: to_tokens(b["raw"]), lambda b: b["teacher"] @ basis.down)
    for _ in range(X.get("irls", 0)):
        def target2(b):
            raw = to_tokens(b["raw_old"]); sd = raw.var(-1, unbiased=False, keepdim=True).add(norm.eps).sqrt()
            return (b["teacher"] @ basis.down - ours.embed_norm.bias) / ours.embed_norm.weight * sd
        def weight2(b):
            return to_tokens(b["raw_old"]).var(-1, unbiased=False).add(norm.eps).reciprocal()
        import copy
        old = copy.deepcopy(ours.embed)
        batches.define(raw_old=lambda b: old(b[f"student_{i}"]))
        fit_linear(batches, ours.embed, lambda b: b[f"student_{i}"], target2, settings.ridge, prior, weight2)
        fit_norm(batches, ours.embed_norm, lambda b: to_tokens(b["raw"]), lambda b: b["teacher"] @ basis.down)
    batches.store(teacher="teacher", student="student", grid="grid")


def solve_block(theirs: list[Block], ours: Block, basis: Basis, batches: Activations, settings: Settings) -> None:
    """Solve a block that stands for some of the teacher's."""
    def trace(b):
        t, out = b["teacher"], []
        for block in theirs:
            mid = block.attend(t, b["grid"])
            end = block.feed(mid, b["grid"])
            out.append((t, mid)); t = end
        return out, t
    batches.define(trace=trace)
    batches.store(trace="trace")
    tm = {"first": 0, "last": -1}[X.get("tmpl", "first")]
    batches.define(entry=lambda b: b["trace"][0][tm][0], end_t=lambda b: b["trace"][1],
        aim=lambda b: {"own": b["trace"][0][tm][1], "last": b["trace"][0][-1][1], "end": b["trace"][1]}[X.get("aim", "own")])
    solve_attention(theirs[tm], ours, basis, batches, settings)
    solve_ffn(theirs, ours, basis, batches, settings)


def precision(b: Batch, name: str) -> Tensor | None:
    """How much a token counts: the norms that read the stream divide it by its deviation."""
    if not X.get("ws", 1): return torch.ones(b[name].shape[:2])
    return b[name].var(-1).add(1e-6).reciprocal()


def solve_attention(theirs: Block, ours: Block, basis: Basis, batches: Activations, settings: Settings) -> None:
    at, as_ = theirs.attention, ours.attention
    batches.define(normed_t=lambda b: theirs.norm1(b["entry"]), normed_s=lambda b: ours.norm1(b["student"]))
    to_q, to_k, to_v, from_v = head_maps(theirs, as_, basis, batches)
    fit_norm(batches, ours.norm1, lambda b: b["student"], lambda b: basis.normed(theirs.norm1, b["entry"]))
    reader = basis.reader(theirs.norm1)
    r = settings.ridge
    fit_linear(batches, as_.q, lambda b: b["normed_s"], lambda b: at.q(b["normed_t"]) @ to_q, r, to_q.T @ at.q.weight @ reader.T)
    if at.reduce is not None:
        reader = solve_reduction(at, as_, basis, reader, batches, settings)
    batches.define(
        context_t=lambda b: at.context(b["normed_t"], b["grid"]),
        context_s=lambda b: as_.context(b["normed_s"], b["grid"]),
    )
    to_kv = torch.block_diag(to_k, to_v)
    fit_linear(batches, as_.kv, lambda b: b["context_s"], lambda b: at.kv(b["context_t"]) @ to_kv, r, to_kv.T @ at.kv.weight @ reader.T)
    batches.define(
        heads_s=lambda b: as_.attended(b["normed_s"], b["context_s"]),
        middle_s=lambda b: b["student"] + as_.proj(b["heads_s"]),
    )
    prior = basis.down.T @ at.proj.weight @ from_v.T
    fit_linear(batches, as_.proj, lambda b: b["heads_s"], lambda b: b["aim"] @ basis.down - b["student"], r, prior, lambda b: precision(b, "aim"))
    batches.store(student="middle_s")


def solve_reduction(at, as_, basis, reader, batches, settings):
    batches.define(shrunk_t=lambda b: at.shrunk(b["normed_t"], b["grid"]), shrunk_s=lambda b: as_.shrunk(b["normed_s"], b["grid"]))
    if basis.identity:
        inner = basis
    elif X.get("ctx", 1):
        m = Moments()
        read = at.kv.weight * at.norm.weight
        for b in batches: m.add(F.layer_norm(b["shrunk_t"], b["shrunk_t"].shape[-1:]))
        inner = principal_basis(m.second(), len(as_.norm.weight), settings.generator)
    else:
        inner = basis
    prior = torch.einsum("ochw,dc->odhw", at.reduce.weight, reader)
    prior = torch.einsum("ochw,op->pchw", prior, inner.down)
    fit_linear(batches, as_.reduce, lambda b: to_map(b["normed_s"], b["grid"]), lambda b: b["shrunk_t"] @ inner.down, settings.ridge * X.get("srr", 10), prior)
    fit_norm(batches, as_.norm, lambda b: b["shrunk_s"], lambda b: inner.normed(at.norm, b["shrunk_t"]))
    return inner.reader(at.norm)


def head_maps(theirs: Block, ours: Attention, basis: Basis, batches: Activations):
    at = theirs.attention
    ht, hs, dt, ds = at.heads, ours.heads, at.width, ours.width
    like = at.q.weight
    if ht == hs and dt == ds:
        eye = torch.eye(ht * dt)
        return eye, eye, eye, eye
    Q, K, V = ([Moments() for _ in range(ht)] for _ in range(3))
    for b in batches:
        n = b["normed_t"]; c = at.context(n, b["grid"])
        q = at.q(n); kv = at.kv(c); k, v = kv.chunk(2, -1)
        from transkd.layers.attention import attend
        o = attend(q, kv, ht)
        k = k - k.mean(1, keepdim=True)
        for h in range(ht):
            s = slice(h * dt, (h + 1) * dt)
            Q[h].add(q[..., s]); K[h].add(k[..., s]); V[h].add(o[..., s])
    C = ht * dt; Cs = hs * ds
    tq, tk, tv = (torch.zeros(C, Cs, dtype=torch.float64) for _ in range(3)); fv = torch.zeros(Cs, C, dtype=torch.float64)
    readout = (basis.down.T @ at.proj.weight).double()
    facts = []
    for h in range(ht):
        s = slice(h * dt, (h + 1) * dt)
        if X.get("heads", "factor") == "subset":
            keep = torch.arange(ds) * dt // ds
            e = torch.eye(dt, dtype=torch.float64)[:, keep]
            aq = e * (dt / ds); ak = e; av, zv, sz = e, e.T, torch.ones(ds)
        else:
            aq, ak = score_factors(Q[h].second(), K[h].second(), ds)
            av, zv, sz = value_factors(V[h].covariance(), readout[:, s], dt)
        facts.append((aq, ak, av, zv, float(sz.square().sum())))
    if hs <= ht:
        order = sorted(sorted(range(ht), key=lambda h: -facts[h][4])[:hs])
        pairs = [(h, 0) for h in order]
    else:
        pairs = [(a * ht // hs, 0) for a in range(hs)]
        pairs = [(h, sum(1 for x in pairs[:a] if x[0] == h)) for a, (h, _) in enumerate(pairs)]
    for a, (h, part) in enumerate(pairs):
        aq, ak, av, zv, _ = facts[h]
        s = slice(h * dt, (h + 1) * dt); r = min(ds, aq.shape[1])
        tq[s, a * ds : a * ds + r] = aq[:, :r] * (ds / dt) ** 0.5
        tk[s, a * ds : a * ds + r] = ak[:, :r]
        av, zv = av[:, part * ds : (part + 1) * ds], zv[part * ds : (part + 1) * ds]
        tv[s, a * ds : a * ds + av.shape[1]] = av
        fv[a * ds : a * ds + av.shape[1], s] = zv
    return tq.float(), tk.float(), tv.float(), fv.float()


def solve_ffn(theirs: list[Block], ours: Block, basis: Basis, batches: Activations, settings: Settings) -> None:
    fs = ours.ffn
    if not X.get("union", 1): pick = [len(theirs) - 1]
    else: pick = list(range(len(theirs)))
    blocks = [theirs[k] for k in pick]
    r = settings.ridge
    batches.define(
        end_t=lambda b: b["trace"][1], middle=lambda b: b["trace"][0][-1][1],
        normed_s=lambda b: ours.norm2(b["student"]),
        hidden_t=lambda b: torch.cat([theirs[k].ffn.fc1(theirs[k].norm2(b["trace"][0][k][1])) for k in pick], -1),
        filtered_t=lambda b: torch.cat([x.ffn.filtered(h, b["grid"]) for x, h in zip(blocks, b["hidden_t"].chunk(len(blocks), -1))], -1),
        active_t=lambda b: F.gelu(b["filtered_t"]),
        target=lambda b: b["end_t"] @ basis.down - b["student"],
        hidden_s=lambda b: fs.fc1(b["normed_s"]),
        active_s=lambda b: F.gelu(fs.filtered(b["hidden_s"], b["grid"])),
        out_s=lambda b: b["student"] + fs.fc2(b["active_s"]),
    )
    fit_norm(batches, ours.norm2, lambda b: b["student"], lambda b: basis.normed(theirs[-1].norm2, b["middle"]))
    count = fs.fc1.out_features
    w1 = torch.cat([x.ffn.fc1.weight @ basis.reader(x.norm2).T for x in blocks])
    w2 = torch.cat([basis.down.T @ x.ffn.fc2.weight for x in blocks], 1)
    dw = torch.cat([x.ffn.depthwise.weight for x in blocks]); db = torch.cat([x.ffn.depthwise.bias for x in blocks])
    if count == len(w1): units = torch.arange(count)
    else:
        g = Gram()
        for b in batches: g.add(b["active_t"], b["target"], precision(b, "end_t"))
        xx, xy, _ = g.centred()
        if X.get("units", "ols") == "score":
            units = (xx.diagonal().sqrt() * w2.norm(dim=0)).topk(count).indices.sort().values
        elif X.get("units", "ols") == "tols":
            units = reconstructing_units(xx, xx @ w2.double().T, count)
        else: units = reconstructing_units(xx, xy, count)
    fit_linear(batches, fs.fc1, lambda b: b["normed_s"], lambda b: b["hidden_t"][..., units], r, w1[units])
    fs.depthwise.weight.copy_(dw[units]); fs.depthwise.bias.copy_(db[units])
    if X.get("dw", 0):
        fit_depthwise(batches, fs.depthwise, lambda b: to_map(b["hidden_s"], b["grid"]), lambda b: to_map(b["filtered_t"][..., units], b["grid"]), r)
    fit_linear(batches, fs.fc2, lambda b: b["active_s"], lambda b: b["target"], r, w2[:, units], lambda b: precision(b, "end_t"))
    batches.store(teacher="end_t", student="out_s")


def fit_depthwise(batches, conv, inputs, targets, ridge):
    xx = xy = 0; n = 0
    for b in batches:
        x, y = inputs(b), targets(b)
        B, H = x.shape[:2]
        u = F.unfold(x.reshape(B * H, 1, *x.shape[2:]), 3, padding=1).reshape(B, H, 9, -1).permute(1, 0, 3, 2).reshape(H, -1, 9).double()
        u = torch.cat([u, torch.ones_like(u[..., :1])], 2)
        y = y.flatten(2).permute(1, 0, 2).reshape(H, -1, 1).double()
        xx = xx + u.transpose(1, 2) @ u; xy = xy + u.transpose(1, 2) @ y
    w0 = torch.cat([conv.weight.reshape(H, 9), conv.bias[:, None]], 1)[:, :, None].double()
    lam = ridge * xx.diagonal(dim1=1, dim2=2)[:, :9].mean(1)[:, None, None] * torch.eye(10, dtype=torch.float64)
    lam[:, 9, 9] = 0
    w = torch.linalg.solve(xx + lam, xy + lam @ w0)[..., 0]
    conv.weight.copy_(w[:, :9].reshape(conv.weight.shape)); conv.bias.copy_(w[:, 9])


