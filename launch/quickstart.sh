#!/usr/bin/env bash
# From nothing to generated digits: environment, tokenizer, bits, generator, samples.
# Writes to runs/digits, or to the directory given. Run again, it continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh quickstart
out="${1:-runs/digits}"
bitgen() { "$VENV/bin/python" -m bitgen.main "$@"; }

echo "1/5 train a tokenizer: 32x32 images of digits to bits and back"
bitgen --config=configs/digits_tokenizer.py --workdir="$out/tokenizer"
echo "2/5 measure it on digits that it has not seen"
bitgen --config=configs/digits_tokenizer.py --workdir="$out/tokenizer" --mode=reconstruct
echo "3/5 turn the digits into bits"
bitgen --config=configs/digits_tokenizer.py --workdir="$out" --mode=tokenize \
  --config.tokenizer="$out/tokenizer/model" --config.tokenize.views=1
echo "4/5 train a generator on the bits"
bitgen --config=configs/digits_bigr.py --workdir="$out/bigr" \
  --config.tokenizer="$out/tokenizer/model" --config.data.path="$out/bits"
echo "5/5 sample ten of each digit"
bitgen --config=configs/digits_bigr.py --workdir="$out/bigr" --mode=sample \
  --config.tokenizer="$out/tokenizer/model"
cp "$out/bigr/samples.png" "$out/samples.png"
cat <<END

Look at  $out/samples.png                          a row of samples for each digit
         $out/tokenizer/reconstructions.png       test images above what the bits keep of them
         $out/*/metrics.jsonl                     every number; tensorboard --logdir=$out
Next     docs/training.md: train on your own pictures
END
