#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, with xpk. Never run: only its syntax and flags are tested.
#
#   export PROJECT=my-project ZONE=us-west4-a CLUSTER=my-cluster IMAGE=my-registry/kd_ranker:latest
#   examples/launch/xpk.sh kd-ranker v5litepod-16
#
# The arguments are the name of the workload and the type of the slice. The image has this package with
# the extra `tpu`. The hosts share a storage that the cluster mounts at /shared (`xpk storage attach` with
# --auto-mount=true), with the dataset in /shared/data: `kd-ranker prepare` makes it on any machine that has
# the storage. xpk restarts the workload when it loses a machine, and the sweep resumes from its last checkpoint.
set -euo pipefail

workload=${1:?the name of the workload is missing}
type=${2:?the type of the slice is missing, such as v5litepod-16}
: "${PROJECT:?is the project of the cluster; export it}" "${ZONE:?is the zone of the cluster; export it}"
: "${CLUSTER:?is the name of the cluster; export it}" "${IMAGE:?is an image with this package; export it}"

xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$workload" \
  --tpu-type="$type" --num-slices=1 --docker-image="$IMAGE" --max-restarts=50 \
  --termination-grace-period-seconds=120 --restart-on-user-code-failure \
  --command="exec kd-ranker sweep --config=sweeps/cascade --config.data.dir=/shared/data \
    --workdir=/shared/runs/weights --config.train.checkpoint_every=200 --config.parallel.processes=True"
