#!/usr/bin/env bash
# Checks everything that the compiler does not: workflows and actions against their schemas and zizmor's most
# pedantic rules, every shell script and every `run:` block with shellcheck, the dependencies' licences, sources and
# versions, the spelling, and the site of docs/, which has to build without a warning.
# A missing tool is a failure (69) that says how to get it, never a skip.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
export PATH=$root/target/tools/bin:$PATH

for tool in zizmor check-jsonschema shellcheck cargo-deny typos mkdocs; do
  command -v "$tool" >/dev/null || {
    echo "lint: \`$tool\` is missing; scripts/bootstrap.sh tools installs it" >&2
    exit 69
  }
done

# Tracked, or new and not ignored.
files() {
  git ls-files --cached --others --exclude-standard -z -- "$@" | while IFS= read -r -d '' file; do
    if [ -f "$file" ]; then printf '%s\n' "$file"; fi
  done
}

mapfile -t workflows < <(files '.github/workflows/*.yml' '.github/workflows/*.yaml')
mapfile -t actions < <(files 'action.yml' 'actions/*/action.yml')
mapfile -t scripts < <(files | while read -r file; do
  # Tests and fixtures may hold scripts that are wrong on purpose.
  case $file in tests/*) continue ;; esac
  case $(head -c 64 "$file" | tr -d '\0' | head -n 1) in '#!'*[/\ ]sh | '#!'*[/\ ]bash) echo "$file" ;; esac
done)
echo "lint: ${#workflows[@]} workflows, ${#actions[@]} actions, ${#scripts[@]} scripts"
[ ${#workflows[@]} -gt 0 ] && [ ${#actions[@]} -gt 0 ] && [ ${#scripts[@]} -gt 0 ]

typos
mkdocs --quiet build --strict
# Their licences are in the sources that cargo has fetched. Advisories take a database from the network: ci.yml.
cargo fetch --quiet --locked
cargo-deny --offline --log-level error check bans licenses sources
zizmor --offline --no-progress --persona pedantic .
check-jsonschema --builtin-schema vendor.github-workflows "${workflows[@]}"
check-jsonschema --builtin-schema vendor.github-actions "${actions[@]}"
shellcheck "${scripts[@]}"

# GitLab's templates: behind the inputs comes what its schema knows.
pipelines=$(mktemp -d)
trap 'rm -rf "$pipelines"' EXIT
mapfile -t templates < <(files 'gitlab/*.yml')
for template in "${templates[@]}"; do
  sed '1,/^---$/d' "$template" >"$pipelines/$(basename "$template")"
done
check-jsonschema --builtin-schema vendor.gitlab-ci "$pipelines"/*.yml

# Each `run:` block as a script of its own, named after where it stands.
blocks=$(mktemp -d)
trap 'rm -rf "$blocks" "$pipelines"' EXIT
python=$(head -n 1 "$(command -v check-jsonschema)")
"${python#\#!}" - "$blocks" "${workflows[@]}" "${actions[@]}" <<'PYTHON'
import pathlib, sys
from ruamel.yaml import YAML

folder = pathlib.Path(sys.argv[1])


def runs(node):
    if isinstance(node, dict):
        if isinstance(node.get("run"), str):
            yield node["run"], node.get("shell", "bash")
        for child in node.values():
            yield from runs(child)
    elif isinstance(node, list):
        for child in node:
            yield from runs(child)


for file in sys.argv[2:]:
    for number, (script, shell) in enumerate(runs(YAML(typ="safe").load(pathlib.Path(file)))):
        name = f"{file.replace('/', '__')}.run{number}.sh"
        (folder / name).write_text(f"#!/usr/bin/env {shell}\n{script}\n")
PYTHON
if compgen -G "$blocks/*.sh" >/dev/null; then shellcheck "$blocks"/*.sh; fi
echo "lint: clean"
