#!/usr/bin/env bash
# Makes the pictures of README and model cards again, from the weights as they are. Nothing is picked: seeds from 0 on.
set -euo pipefail
cd "$(dirname "$0")"

common=(--force --quiet --format webp)
tpdne sheet --model faces --seed 0 --grid 10x4 --size 96 --quality 80 -o sheet-faces.webp "${common[@]}"
tpdne sheet --model cats --seed 0 --grid 10x4 --size 96 --quality 80 -o sheet-cats.webp "${common[@]}"
for psi in 0.5 0.7 0.85 1.0; do
    tpdne sheet --model faces --seed 0 --grid 8x8 --quality 80 --psi "$psi" -o "faces-psi$psi.webp" "${common[@]}"
    tpdne sheet --model cats --seed 0 --grid 8x8 --quality 80 --psi "$psi" -o "cats-psi$psi.webp" "${common[@]}"
done
for model in faces cats; do
    tpdne interpolate --model "$model" --seeds 1,5,7,12 --loop --frames 96 --fps 24 --quality 75 -o "walk-$model.webp" --force --quiet
done
tpdne mix --rows 1,2,3 --cols 10-14 --quality 80 -o mix.webp --force --quiet
python - <<'PY'
import tpdne_cli as tpdne

seeds = [1, 3, 5, 8, 12, 13, 19, 24]
family = [image for name in ("faces", "cats") for image in tpdne.sample(tpdne.load(name), seeds)]
tpdne.save_sheet(family, "cousins.webp", grid=(8, 2))
PY
