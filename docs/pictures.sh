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
from tpdne_cli.critic import Critic, Judged
from tpdne_cli.sampler import Sampler, Settings

faces, cats = tpdne.load("faces"), tpdne.load("cats")
seeds = [1, 3, 5, 8, 12, 13, 19, 24]
family = [image for model in (faces, cats) for image in tpdne.sample(model, seeds)]
tpdne.save_sheet(family, "cousins.webp", grid=(8, 2))

# One person a row, from -2 to 2 along a direction; two directions side by side.
amounts = (-2, -1, 0, 1, 2)
rows = [("age", 1, "smile", 5), ("woman", 1, "turn", 5), ("light", 1, "warm", 5)]
steps = [next(tpdne.sample(faces, [seed], attributes={name: amount}))
         for left, a, right, b in rows for name, seed in ((left, a), (right, b)) for amount in amounts]
tpdne.save_sheet(steps, "directions.webp", grid=(10, 3), size=96)

# Of 320 seeds those of the lowest tenth of realism, and below them those of the highest.
for model in (faces, cats):
    for psi in (0.7, 1.0):
        sampler = Sampler(model, Settings(truncation=psi))
        judged = list(Judged(sampler, Critic.load(model))(range(320)))
        order = sorted(judged, key=lambda image: image.recipe["realism"])
        tpdne.save_sheet([*order[:32], *order[-32:]], f"realism-{model.name}-psi{psi}.webp", grid=(16, 4), size=96)
PY
