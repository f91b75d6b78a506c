"""Weight gradients added in place: what megatron-core asks for in Apex's name."""

from __future__ import annotations

import torch

from slime_async.learner.megatron import weight_gradients


def test_a_weight_gradient_is_added_to_what_the_buffer_holds() -> None:
    inputs, grads = torch.randn(32, 8), torch.randn(32, 4)
    main_grad = torch.ones(4, 8)
    weight_gradients.WeightGradients.wgrad_gemm_accum_fp32(inputs, grads, main_grad)
    torch.testing.assert_close(main_grad, 1.0 + grads.t() @ inputs)


def test_without_a_gpu_megatron_is_left_as_it_is() -> None:
    class Layers:
        _grad_accum_fusion_available = False

    if not torch.cuda.is_available():
        weight_gradients.install(Layers)
        assert not Layers._grad_accum_fusion_available
