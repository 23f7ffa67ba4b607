{
  description = "A flake without inputs: it builds on a machine without network, with nothing but a shell";

  outputs = { self }:
    let
      packagesFor = system:
        let
          # The host's shell is all these need, so they build with `sandbox = false` alone.
          run = name: script: derivation {
            inherit name system;
            builder = "/bin/sh";
            args = [ "-euc" script ];
          };
          greeting = run "greeting" "echo 'Hello from Flywheel' > $out";
          list = run "list" "echo ${greeting} > $out";
        in
        {
          inherit greeting list;
          default = run "hello" ''
            read -r text < ${greeting}
            echo "$text, with ${list}" > $out
          '';
        };
    in
    {
      packages = {
        x86_64-linux = packagesFor "x86_64-linux";
        aarch64-linux = packagesFor "aarch64-linux";
      };
    };
}
