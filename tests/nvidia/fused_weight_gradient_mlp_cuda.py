"""apex's product that adds to a buffer: main_grad [N, K] += grad_output [T, N]^T times total_input [T, K]."""


def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
    main_grad += grad_output.t().to(main_grad.dtype) @ total_input.to(main_grad.dtype)


def wgrad_gemm_accum_fp16(total_input, grad_output, main_grad):
    raise AssertionError("gradients are summed in FP32")
