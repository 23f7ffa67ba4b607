//! A bundle of trusted certificates for programs that look for a file, on a machine that has none where they look: the
//! system's own from another place, or else the roots in this program, as a file.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::NamedTempFile;
use webpki_root_certs::TLS_SERVER_ROOT_CERTS;

/// Where Nix looks if no variable names a bundle (`globals.cc`).
const PLACES_OF_NIX: [&str; 2] = [
    "etc/ssl/certs/ca-certificates.crt",
    "nix/var/nix/profiles/default/etc/ssl/certs/ca-bundle.crt",
];
/// Where distributions have it besides: Fedora and its kin, openSUSE, Alpine and OpenBSD.
const OTHER_PLACES: [&str; 4] = [
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
];
const NAME: &str = "ca-bundle.pem";
/// Characters of base64 on a line of PEM (RFC 7468).
const LINE: usize = 64;

/// Where a machine has its bundle.
#[derive(Debug, PartialEq, Eq)]
pub enum Bundle {
    /// Where Nix looks.
    Known,
    /// Where Nix does not look.
    Elsewhere(PathBuf),
    Missing,
}

impl Bundle {
    /// Looks below the root folder of a machine.
    pub fn find(root: &Path) -> Self {
        let first = |places: &[&str]| {
            let mut files = places.iter().map(|place| root.join(place));
            files.find(|file| file.is_file())
        };
        match (first(&PLACES_OF_NIX), first(&OTHER_PLACES)) {
            (Some(_), _) => Self::Known,
            (None, Some(file)) => Self::Elsewhere(file),
            (None, None) => Self::Missing,
        }
    }
}

/// Writes the roots in this program into a folder of this user's alone, and returns the file.
///
/// # Errors
/// When the folder cannot be written to.
pub fn write(folder: &Path) -> io::Result<PathBuf> {
    let file = folder.join(NAME);
    // Another job may read the file at this moment.
    let mut new = NamedTempFile::new_in(folder)?;
    new.write_all(pem().as_bytes())?;
    new.persist(&file)?;
    Ok(file)
}

fn pem() -> String {
    let mut text = String::new();
    for certificate in TLS_SERVER_ROOT_CERTS {
        let encoded = STANDARD.encode(certificate);
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        for line in encoded.as_bytes().chunks(LINE) {
            text.extend(line.iter().copied().map(char::from));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject as _;

    use super::*;

    #[test]
    fn every_root_is_in_the_file() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let file = write(folder.path()).expect("written");
        let read = CertificateDer::pem_file_iter(&file).expect("read");
        let read: Vec<_> = read.map(|one| one.expect("a certificate")).collect();
        assert!(read.len() > 100 && read == TLS_SERVER_ROOT_CERTS);
        // A second job writes it again.
        assert_eq!(write(folder.path()).expect("written"), file);
    }

    #[test]
    fn the_machines_own_comes_first() {
        let root = tempfile::tempdir().expect("temporary folder");
        assert_eq!(Bundle::find(root.path()), Bundle::Missing);
        for (place, known) in [("etc/ssl/cert.pem", false), (PLACES_OF_NIX[0], true)] {
            let file = root.path().join(place);
            fs::create_dir_all(file.parent().expect("a folder")).expect("made");
            fs::write(&file, "").expect("written");
            let wanted = if known {
                Bundle::Known
            } else {
                Bundle::Elsewhere(file)
            };
            assert_eq!(Bundle::find(root.path()), wanted);
        }
    }
}
