{
  outputs = { self }:
    let
      system = "x86_64-linux";
      seed = builtins.readFile ./seed;
      tag = builtins.substring 0 12 (builtins.hashString "sha256" seed);
      bb = builtins.path { path = ./bin; name = "bb"; };
      with' = attributes: name: script: derivation ({
        name = "${name}-${tag}";
        inherit system;
        builder = "${bb}/busybox";
        args = [ "sh" "-ec" script ];
        PATH = "${bb}";
      } // attributes);
      run = with' { };
      program = name: run name ''
        ${bb}/busybox mkdir -p $out/bin
        printf '#!${bb}/busybox sh\necho ${name} ${shared}\n' > $out/bin/${name}
        ${bb}/busybox chmod +x $out/bin/${name}
      '' // { meta.mainProgram = name; };
      floating = with' { __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; };
      text = builtins.toFile "text-${tag}" "a text of ${tag}";
      shared = run "shared" "echo shared ${tag} > $out";
      many = prefix: builtins.listToAttrs (map (n: rec {
        name = "${prefix}${toString n}";
        value = run name "echo ${toString n} ${tag} > $out";
      }) (builtins.genList (n: n) 12));
      ca = floating "ca" "echo ${shared} ${tag} > $out";
    in {
      packages.${system} = many "p" // many "q" // {
        inherit shared ca;
        one = with' { outputs = [ "out" "dev" ]; } "one" "echo ${shared} ${text} > $out; echo $out > $dev";
        cold = run "cold" "echo ${shared} > $out";
        warm = run "warm" "echo warm ${tag} > $out";
        app = program "app";
        tool = program "tool";
        catop = floating "catop" "echo ${ca} > $out";
        usesca = run "usesca" "echo ${ca} > $out";
      };
    };
}
