//! Everything that knows Nix: its formats, its store, its settings, how it is found or installed.
//! Nothing here decides who may publish or talks to a cache.

pub mod bootstrap;
pub mod build;
pub mod build_logs;
pub mod cache_name;
pub mod command_stores;
pub mod content_address;
pub mod daemon_probe;
pub mod daemon_proxy;
pub mod db;
pub mod effective_settings;
mod error_message;
pub mod flake;
pub mod gc;
pub mod hash;
pub mod kept_paths;
pub mod key;
pub mod nar;
pub mod nar_validator;
pub mod narinfo;
pub mod netrc;
pub mod path_info;
pub mod path_json;
pub mod ping;
pub mod result_links;
pub mod scan;
pub mod settings;
pub mod store;
pub mod store_location;
pub mod store_path;
pub mod store_watcher;
pub mod store_writers;
pub mod temp_roots;
pub mod tool;
