# What the scripts of `tests/real/install.rs` have in common. Sourced in the root of busybox.
# The test's own folders are not in this root.
unset TMPDIR XDG_RUNTIME_DIR XDG_STATE_HOME
export PATH=/bin HOME=/root NIX_CONFIG='sandbox = false
substituters ='
key=$(cat /fly/closure/key.pub)
path=$(cat /fly/closure/path)

fail() {
  echo "FAILED: $*"
  exit 1
}

# Serves a folder on a port.
serve() {
  httpd -p "127.0.0.1:$2" -h "$1"
}

# A job that runs a command with the Nix of the cache on port 8080.
job() {
  /fly/flywheel nix-job --nix-installer closure --nix-source "${SOURCE-http://127.0.0.1:8080 $key}" --nix-version "$path" \
    --command "$1"
}

# A job that has to end with 69 and a message, and leave nothing.
refused() {
  echo "--- $1"
  job true >/out/refused 2>&1 && fail "it was installed: $1"
  code=$?
  cat /out/refused
  [ $code = 69 ] || fail "the exit code is $code"
  grep -q "$1" /out/refused || fail "it does not say: $1"
  [ -z "$(ls -A /nix 2>/dev/null)" ] || fail "something is left: $(find /nix | head -n 20)"
}

# A Nix that is whole: each path as it was signed, and nothing beside them.
whole() {
  nix-store --verify --check-contents || fail 'a path is damaged'
  [ "$(nix-store --query --requisites "$path" | wc -l)" = "$(wc -l </fly/closure/store-paths)" ] || fail 'not all paths are valid'
  [ -z "$(find /nix -name '*partial*' -o -name registration -o -name '*.new')" ] || fail "something is left: $(find /nix -name '*partial*')"
}
