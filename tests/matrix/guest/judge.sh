# The judge: stock Nix with an empty store and an empty home, and the job's cache as its only substituter. Sourced.
# Nothing of flywheel has a part in it but the server that the cache is read from.

# The attributes that the job NAME called its results, as flake references, a line each.
references() {
  sort -u "/out/$1/attributes" | sed 's/^/path:.#/'
}

. /shared/judge.sh
FEATURES=
[ "$SHAPE" != ca ] || FEATURES=ca-derivations

# Whether an attribute is made by content-addressed derivations, so that its path is found by its realisation alone.
floating() {
  case $1 in *\#ca | *\#catop | *\#usesca) return 0 ;; esac
  return 1
}

# Writes what the job NAME should have published: the outputs of its results, those of the derivations that they need as
# far as they were made, and what it added. Nix says it, in the job's own store, after the job; a result that was
# collected is evaluated anew, and stays a result.
expect() {
  local out=/out/$1 reference
  local -a references named=() derivations outputs
  cd "/area/$1/flake"
  cp "$out/added" "$out/expected"
  mapfile -t references < <(references "$1")
  if [ ${#references[@]} -gt 0 ]; then
    # A floating output has no path here, or one of no derivation: it is asked for by its attribute.
    for reference in "${references[@]}"; do
      floating "$reference" || named+=("$reference")
    done
    if [ ${#named[@]} -gt 0 ]; then
      mapfile -t derivations < <(as "$USER_NAME" nix path-info --derivation "${named[@]}")
      as "$USER_NAME" nix-store --query --outputs "${derivations[@]}" >>"$out/expected"
    fi
    mapfile -t derivations < <(as "$USER_NAME" nix path-info --derivation --recursive "${references[@]}" | grep '\.drv$')
    [ ${#derivations[@]} -gt 0 ]
    mapfile -t outputs < <(as "$USER_NAME" nix-store --query --outputs "${derivations[@]}" | grep '^/nix/store/' |
      grep -vE -- '-(ca|catop|usesca)-[0-9a-f]{12}$')
    as "$USER_NAME" nix-store --check-validity --print-invalid "${outputs[@]}" >"$out/unmade"
    # It is no error if none of them was made.
    printf '%s\n' "${outputs[@]}" | grep -vxF -f "$out/unmade" >>"$out/expected" || [ $? -eq 1 ]
  fi
  sort -u -o "$out/expected" "$out/expected"
}

# Writes into /out/NAME/missing what the empty store cannot have: a store path a line.
judge() {
  local out=/out/$1 reference path
  local -a expected
  expect "$1" 2>"$out/expect.log"
  serve_cache "/area/$1/cache" "$out/serve.log" as "$USER_NAME"
  rm -rf /judge
  mkdir -p /judge/home /judge/etc /judge/store
  : >"$out/missing"
  mapfile -t expected <"$out/expected"
  if [ ${#expected[@]} -gt 0 ]; then
    # It fails where a path is missing; which ones are, is asked below, and a judge that breaks finds all of them missing.
    fresh nix-store --realise --keep-going "${expected[@]}" >/dev/null 2>"$out/judge.log" || true
    fresh nix-store --check-validity --print-invalid "${expected[@]}" >"$out/missing" 2>>"$out/judge.log"
    # One that fails may keep another from being tried, so each gets a turn of its own.
    while read -r path; do
      fresh nix-store --realise "$path" >/dev/null 2>>"$out/judge.log" || true
    done < <(cat "$out/missing")
    fresh nix-store --check-validity --print-invalid "${expected[@]}" >"$out/missing" 2>>"$out/judge.log"
  fi
  # A floating output is found by its realisation: the same flake is evaluated, and nothing may be built. It is named
  # by what its name in a store has after the hash.
  cd "/area/$1/flake"
  while read -r reference; do
    floating "$reference" || continue
    path="-${reference#path:.#}-$(printf %s "$SEED" | sha256sum | cut -c 1-12)"
    echo "$path" >>"$out/floating-attributes"
    fresh nix build --no-link "$reference" 2>>"$out/judge.log" || echo "$path" >>"$out/missing"
  done < <(references "$1")
}
