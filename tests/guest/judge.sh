# The judge's means: a cache that a job left is served, and stock Nix reads it into an empty store. Sourced.

# Serves a cache's folder; sets URL and KEY, and SERVED to the process. What follows the log's name comes before the command.
serve_cache() {
  cache=$1 log=$2
  shift 2
  rm -f "$cache.url"
  "$@" /fly/flywheel cache serve --dir "$cache" --listen 127.0.0.1:0 --ready-file "$cache.url" --stop-after 10m \
    </dev/null >"$log" 2>&1 &
  SERVED=$!
  end=$(($(date +%s) + 20))
  until [ -s "$cache.url" ] && grep -q '^public-key ' "$log"; do
    [ "$(date +%s)" -lt "$end" ] || { echo 'the cache is not served after 20 s' && cat "$log" && exit 70; }
    sleep 0.02
  done
  URL=$(cat "$cache.url")/main
  KEY=$(sed -n 's/^public-key //p' "$log" | head -n 1)
}

# A command of Nix in the empty store, with the cache as its only substituter. It builds nothing.
fresh() {
  env -i PATH="$PATH" LANG=C.UTF-8 HOME=/judge/home NIX_CONF_DIR=/judge/etc NIX_REMOTE=/judge/store \
    NIX_CONFIG="experimental-features = nix-command flakes ${FEATURES-}
substituters = $URL
trusted-public-keys = $KEY
max-jobs = 0
builders =
build-users-group =
fallback = false
connect-timeout = 10" "$@"
}
