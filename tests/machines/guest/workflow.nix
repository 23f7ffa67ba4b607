{
  description = "A flake that builds in Nix's sandbox, with a static busybox of its own";

  outputs = { self }: {
    packages.x86_64-linux.default = derivation {
      name = "app";
      system = "x86_64-linux";
      builder = "${self}/bin/busybox";
      args = [ "sh" "-c" "echo 'Built in a workflow' > $out" ];
    };
  };
}
