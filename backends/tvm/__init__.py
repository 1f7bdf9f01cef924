"""The targets that Apache TVM compiles for: what a model becomes, the kernels effic brings, the artifact."""
