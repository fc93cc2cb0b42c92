# What the shells of this site need: the one file to edit. Every job reads it before it starts its nodes; the ranks and
# servers inherit what it exports. It may also lie beside a cluster file of your own. No secrets: others can read it.

# Modules:
#   module load cuda/12.8 nccl

# The network, where NCCL and gloo should not find it by themselves (network.interface of the cluster file names one):
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
#   export NCCL_DEBUG=WARN

# The commands of Slurm and of the container runtime, where jobs do not have them:
#   export PATH=/opt/slurm/bin:$PATH
