#!/usr/bin/env bash
# One training job on all hosts of a Cloud TPU VM slice, one process a host; JAX finds the hosts in their metadata.
#
#   scripts/launch/tpu-vm.sh install NAME ZONE NFS_SERVER:/SHARE    this commit, its environment, /shared; once
#   scripts/launch/tpu-vm.sh run NAME ZONE --config C output_dir=/shared/runs/mine [key=value ...]
#   scripts/launch/tpu-vm.sh stop NAME ZONE                         all save and exit with 75; `run` goes on
#
# Needs gcloud. Any path of the config is one on the hosts, relative to the repository. See docs/launch.md.
set -euo pipefail

if (($# < 3)); then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
action=$1 name=$2 zone=$3
shift 3

everywhere() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

case $action in
    install)
        if (($# != 1)); then
            echo "error: install needs NFS_SERVER:/SHARE, the folder that all hosts share" >&2
            exit 2
        fi
        folder=$(mktemp -d)
        trap 'rm -r "$folder"' EXIT
        git -C "$(dirname "$0")/../.." archive --prefix=jlora/ --output="$folder/jlora.tar" HEAD
        gcloud compute tpus tpu-vm scp "$folder/jlora.tar" "$name:" --zone="$zone" --worker=all
        # uv brings a Python 3.11 where the image has an older one.
        everywhere "set -e
            tar -xf jlora.tar
            python3 -m pip install --quiet --user uv
            ~/.local/bin/uv venv --quiet --clear --python 3.11 ~/jlora-venv
            cd ~/jlora
            ~/.local/bin/uv pip install --quiet --python ~/jlora-venv/bin/python -c constraints.txt -e '.[tpu]'
            sudo apt-get install -qq -y nfs-common
            sudo mkdir -p /shared
            mountpoint -q /shared || sudo mount -t nfs $(printf %q "$1") /shared"
        ;;
    run)
        # JAX_PLATFORMS  a process that finds no TPU fails, where it would train slowly on the CPU
        # nohup, tail    the run outlives a lost connection; this command's output is only a copy of ~/jlora.log
        # There is no memory fraction to set, which only GPUs have, and libtpu needs no flags of ours.
        everywhere "cd ~/jlora
            export JAX_PLATFORMS=\${JAX_PLATFORMS:-tpu,cpu}
            nohup ~/jlora-venv/bin/python -m jlora.train$(printf ' %q' "$@") > ~/jlora.log 2>&1 < /dev/null &
            echo \$! > ~/jlora.pid
            tail --pid=\$! -n +1 -F ~/jlora.log 2> /dev/null
            wait \$!"
        ;;
    stop)
        # The processes agree on the step after which they stop, so that one signal would do; all get it.
        everywhere 'kill -TERM "$(cat ~/jlora.pid)"'
        ;;
    *)
        echo "error: $action is not one of install, run, stop" >&2
        exit 2
        ;;
esac
