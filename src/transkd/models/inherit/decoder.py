import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transkd.layers.upsampling import upsampled
from transkd.models.heads.segformer import SegformerHead
from transkd.models.inherit.fits import Gram, fit_linear, write
from transkd.models.inherit.subspaces import Moments, reconstructing_units, X


def solve_segformer(theirs: SegformerHead, ours: SegformerHead, readers, batches, settings) -> None:
    n = len(readers)
    Wt, bias = theirs.fold(); bn = theirs.linear_fuse.bn
    D, Dt = ours.linear_pred.in_channels, theirs.linear_pred.in_channels
    def summed(b):
        maps = [F.conv2d(b[f"teacher_{i + 1}"], Wt[i]) for i in range(n)]
        return sum(upsampled(m, maps[0].shape[-2:]) for m in maps) + bias[:, None, None]
    batches.define(sum_t=summed, active_t=lambda b: F.relu(bn(b["sum_t"])), logits_t=lambda b: theirs.linear_pred(b["active_t"]))
    if D == Dt: units = torch.arange(D)
    else:
        m = Moments()
        for b in batches: m.add(b["active_t"].permute(0,2,3,1))
        cov = m.covariance(); units = reconstructing_units(cov, cov @ theirs.linear_pred.weight.flatten(1).double().T, D)
    prior = torch.cat([(Wt[i].flatten(1)[units] @ readers[i].T) for i in range(n)], 1)
    batches.define(joined=lambda b: torch.cat([upsampled(b[f"student_{i + 1}"], b["student_1"].shape[-2:]) for i in range(n)], 1))
    g = Gram()
    for b in batches: g.add(b["joined"], b["sum_t"][:, units])
    w, shift = g.solve(settings.ridge, prior)
    parts = w.split([f.shape[0] for f in readers], 1)
    fuse = torch.zeros(D, n * D)
    for i, part in enumerate(parts):
        lin = ours.get_submodule(f"linear_c{i + 1}.proj")
        write(lin, part, shift / n)
        k = n - 1 - i; fuse[:, k * D : (k + 1) * D] = torch.eye(D)
    ours.linear_fuse.conv.weight.copy_(fuse[:, :, None, None])
    for name, tensor in ours.linear_fuse.bn.state_dict().items():
        tensor.copy_(bn.state_dict()[name][units] if tensor.ndim else bn.state_dict()[name])
    sbn = ours.linear_fuse.bn
    def student_active(b):
        W, bb = ours.fold()
        maps = [F.conv2d(b[f"student_{i + 1}"], W[i]) for i in range(n)]
        return F.relu(sbn(sum(upsampled(m, maps[0].shape[-2:]) for m in maps) + bb[:, None, None]))
    batches.define(active_s=student_active)
    fit_linear(batches, ours.linear_pred, lambda b: b["active_s"], lambda b: b["logits_t"], settings.ridge, theirs.linear_pred.weight[:, units])
