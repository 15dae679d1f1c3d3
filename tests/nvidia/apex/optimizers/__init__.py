"""FusedAdam: its arguments, its counter in the group, and its rule, tensor by tensor."""

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert not amsgrad and not capturable and not master_weights
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self._dummy_overflow_buf = torch.cuda.IntTensor([0])
        self.param_groups_master = [{"params": [None] * len(g["params"])} for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        assert self.adam_w_mode and closure is None
        for group, masters in zip(self.param_groups, self.param_groups_master, strict=False):
            group["step"] = group["step"] + 1 if "step" in group else 1
            (beta1, beta2), count = group["betas"], group["step"]
            assert group["bias_correction"]
            for param, _ in zip(group["params"], masters["params"], strict=False):
                if param.grad is None:
                    continue
                state = self.state[param]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                m, v, g = state["exp_avg"], state["exp_avg_sq"], param.grad
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).add_(g * g, alpha=1 - beta2)
                update = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + group["eps"])
                param.sub_(group["lr"] * (update + group["weight_decay"] * param))


class FusedSGD(torch.optim.SGD):
    """Core imports it along with FusedAdam."""
