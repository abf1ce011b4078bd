#!/bin/bash
# Builds the project's image and, for enroot and pyxis, its squashfs file. Prints every command before it runs it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash slurm/build_image.sh [options] [OUT.sqsh]

  OUT.sqsh           the image as enroot and pyxis take it; without it, docker or podman keep the image alone
  --with TOOL        docker, podman or enroot; not given: the first of them that is here
  --base IMAGE       default nvcr.io/nvidia/nemo:26.02; a digest (nvcr.io/nvidia/nemo@sha256:...) not with enroot
  --tag NAME:TAG     of docker's or podman's image, default coalm_nemo:latest
  --pip-conf FILE    pip's settings while it builds (a private index, a CPU index); the image does not keep them
  --dry-run          print the commands only
TEXT
}
refuse() { echo "build_image: $*" >&2; exit 2; }
run() { printf '+%s\n' "$(printf ' %q' "$@")"; ((dry_run)) || "$@"; }
is_here() { command -v "$1" >/dev/null; }

tool="" base=nvcr.io/nvidia/nemo:26.02 tag=coalm_nemo:latest pip_conf="" out="" dry_run=0
while (($#)); do
    case $1 in
    --with | --base | --tag | --pip-conf)
        (($# > 1)) || refuse "$1 needs a value"
        case $1 in --with) tool=$2 ;; --base) base=$2 ;; --tag) tag=$2 ;; --pip-conf) pip_conf=$2 ;; esac
        shift
        ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage && exit 0 ;;
    -*) refuse "unknown option $1; --help lists them" ;;
    *) [[ -z $out ]] || refuse "one file is built at a time, not $out and $1" && out=$1 ;;
    esac
    shift
done

if [[ -z $tool ]]; then
    for tool in docker podman enroot none; do if is_here "$tool"; then break; fi; done
    [[ $tool != none ]] || refuse "neither docker, podman nor enroot is on this machine"
fi
[[ $tool == docker || $tool == podman || $tool == enroot ]] || refuse "--with $tool: use docker, podman or enroot"
((dry_run)) || is_here "$tool" || refuse "$tool is not on this machine"
[[ -z $out || $out == *.sqsh ]] || refuse "$out: the file's name must end in .sqsh"
[[ -z $out || ! -e $out ]] || refuse "$out is there already; remove it or give another name"
[[ -z $out || -d $(dirname "$out") ]] || refuse "the directory of $out is not there"
[[ -z $pip_conf || -r $pip_conf ]] || refuse "pip's settings $pip_conf cannot be read"
[[ -z $out && $tool == enroot ]] && refuse "enroot keeps no images of its own: name the file to write, OUT.sqsh"
[[ -z $out || $dry_run == 1 ]] || is_here enroot ||
    refuse "enroot, which writes $out, is not on this machine; without OUT.sqsh $tool builds the image, for a registry"
[[ $tool != enroot || $base != *@* ]] || refuse "enroot takes a tag, not the digest in $base"
[[ -z $out ]] || out=$(realpath "$out")
[[ -z $pip_conf ]] || pip_conf=$(realpath "$pip_conf")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

with_docker() {
    local words=(--build-arg "BASE=$base" --tag "$tag")
    words+=(--build-arg "REVISION=$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)")
    words+=(--build-arg "CREATED=$(date -u +%FT%TZ)")
    [[ -z $pip_conf ]] || words+=(--secret "id=pip.conf,src=$pip_conf")
    run "$tool" build "${words[@]}" .
    [[ -n $out ]] || return 0
    local scheme=dockerd
    [[ $tool == docker ]] || scheme=podman
    run enroot import --output "$out" "$scheme://$tag"
}

# The Dockerfile's steps, without its image: .dockerignore says what goes in.
with_enroot() {
    local name=coalm_nemo_$$ first=${base%%/*} uri work copied=() mounts
    uri=docker://$base
    [[ $first != *.* ]] || uri="docker://$first#${base#*/}" # enroot's way to write a registry
    work=$(mktemp -d "$(dirname "$out")/build_image.XXXXXX")
    # shellcheck disable=SC2064 # the values of now
    trap "((dry_run)) || enroot remove --force $name >/dev/null 2>&1 || true; rm -rf $(printf %q "$work")" EXIT
    mapfile -t copied < <(sed -n 's/^!//p' .dockerignore)
    mounts=(--mount "$PWD:/source")
    [[ -z $pip_conf ]] || mounts+=(--mount "$pip_conf:/run/secrets/pip.conf")
    local steps="set -f; mkdir -p /opt/coalm_nemo && cd /opt/coalm_nemo && tar -C /source -c --exclude=.* --exclude=*.env"
    steps+=" --exclude=__pycache__ --exclude=*.egg-info ${copied[*]} | tar -x --no-same-owner"
    steps+=" && python3 container/install.py packages && python3 container/install.py project"
    run enroot import --output "$work/base.sqsh" "$uri"
    run enroot create --name "$name" "$work/base.sqsh"
    run enroot start --root --rw "${mounts[@]}" "$name" bash -c "$steps"
    run enroot export --output "$out" "$name"
}

if [[ $tool == enroot ]]; then with_enroot; else with_docker; fi
((dry_run)) || echo "built: ${out:-$tag}"
