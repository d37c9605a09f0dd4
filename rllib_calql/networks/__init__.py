"""The RLModule, its policy and critics, encoders, the kernel for critics on CPUs, precision."""
