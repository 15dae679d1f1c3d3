"""An extension of apex that is there: core takes its kernels for norm and clipping where it finds them."""


def multi_tensor_l2norm(*given):
    raise AssertionError("nobody asked for apex's norm")


def multi_tensor_scale(*given):
    raise AssertionError("nobody asked for apex's scaling")
