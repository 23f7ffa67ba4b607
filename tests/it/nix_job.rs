//! `nix-job` through the front door.
