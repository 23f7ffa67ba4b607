# What a client wrote to the embedded cache with `nix copy`, it reads back: from the same home, with all that its Nix
# remembers of what it sent. Ends with 0 if all of it works.
#
#   usage: read-back.sh FLYWHEEL      in a root with an empty /nix, `nix` on PATH, and /bin/bash
set -euo pipefail

flywheel=$1
area=$(mktemp -d)
export HOME=$area/home
mkdir "$HOME"
cat >"$area/nix.conf" <<END
experimental-features = nix-command flakes
build-users-group =
sandbox = false
substituters =
netrc-file = $area/netrc
END
export NIX_CONF_DIR=$area

"$flywheel" cache serve --dir "$area/cache" --listen 127.0.0.1:0 --ready-file "$area/ready" --stop-after 10m \
  --cache xz,zstd,none,gzip,attic >"$area/serve.out" 2>"$area/serve.log" &
server=$!
trap 'kill $server; wait $server || true' EXIT
for _ in $(seq 500); do
  [ ! -s "$area/ready" ] || break
  sleep 0.02
done
url=$(cat "$area/ready")
echo "machine 127.0.0.1 login flywheel password $(sed -n 's/^write //p' "$area/cache/tokens")" >"$area/netrc"
chmod 600 "$area/netrc"

fail() {
  echo "read-back: $*" >&2
  cat "$area/serve.log" >&2
  exit 1
}

same() {
  [ "$(cat "$1")" = "$(cat "$2")" ]
}

try() {
  "$@" >"$area/out" 2>"$area/err" || {
    cat "$area/out" "$area/err" >&2
    fail "failed: $*"
  }
}

cat >"$area/expr.nix" <<'END'
let step = name: below: derivation {
      inherit name below; system = builtins.currentSystem; builder = "/bin/bash";
      args = [ "-c" "echo ${name} on $below, itself at $out > $out" ];
    };
in step "two" (step "one" (builtins.toFile "text" "nothing"))
END
try nix-build --no-out-link "$area/expr.nix"
path=$(cat "$area/out")
nix-store --generate-binary-cache-key writer-1 "$area/secret" "$area/public"

for compression in xz zstd none; do
  store="$url/$compression?compression=$compression"
  try nix copy --to "$store" "$path"
  # 2.8 and newer differ in whether `ls` looks for a listing first.
  try nix store ls --store "$store" "$path"
  try nix store cat --store "$store" "$path"
  same "$area/out" "$path" || fail "$compression: other content"
  try nix store verify --no-trust --recursive --store "$store" "$path"
  try nix store sign --recursive --key-file "$area/secret" --store "$store" "$path"
  try nix store verify --recursive --trusted-public-keys "$(cat "$area/public")" --sigs-needed 1 --store "$store" "$path"
  # A cache has no build logs; that is an answer, and no error of the cache.
  ! nix log --store "$store" "$path" 2>"$area/err" || fail "$compression: a log"
  grep -q 'is not available' "$area/err" || fail "$compression: $(cat "$area/err")"
  # Copied back, by what the client remembers: it never saw the cache's own signature.
  try nix copy --no-check-sigs --from "$store" --to "$area/store-$compression" "$path"
  same "$area/store-$compression$path" "$path" || fail "$compression: other content in the copy"
  # Nor does it, unless it forgets what it sent.
  try nix path-info --json --store "$store" "$path"
  ! grep -q "\"$compression:" "$area/out" || fail "$compression: the signature of a narinfo that was not asked for"
  try nix path-info --json --option narinfo-cache-positive-ttl 0 --store "$store" "$path"
  grep -q "\"$compression:" "$area/out" || fail "$compression: $(cat "$area/out")"
  # A client that has not sent it sees both signatures.
  HOME=$area/reader try nix path-info --json --store "$url/$compression" "$path"
  grep -q 'writer-1:' "$area/out" && grep -q "\"$compression:" "$area/out" || fail "$compression: $(cat "$area/out")"
done

# Nix gives what it compresses with gzip the name of an uncompressed NAR.
! nix copy --to "$url/gzip?compression=gzip" "$path" 2>"$area/err" || fail "gzip was taken"
grep -q 'PUT /gzip/nar/.* 415 .*compressed with gzip.*compression=zstd' "$area/serve.log" || fail "gzip: $(cat "$area/err")"
# By Attic's protocol and back.
ATTIC_TOKEN=$(sed -n 's/^write //p' "$area/cache/tokens") try "$flywheel" publish --attic-server "$url" --attic-cache attic "$path"
try nix store cat --store "$url/attic" "$path"
same "$area/out" "$path" || fail "attic: other content"
echo 'read back'
