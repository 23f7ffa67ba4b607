//! Turns a request body into a served path; shared by both protocols.

use std::io;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use sha2::Digest as _;

use crate::server::body::RequestBody;
use crate::server::compress::CompressorPool;
use crate::server::content_check::contradiction;
use crate::server::error::ErrorResponse;
use crate::server::ingest::{Format, IngestError, IngestOptions, IngestedNar, ingest};
use crate::server::state::ServerState;
use crate::server::store::{Store, StoredNar};
use crate::server::upload_name;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::hash::Sha256;
use flywheel_nix::nar_validator::NarValidator;
use flywheel_nix::path_info::PathInfo;

/// NARs up to this size, in bytes, are read completely before they are processed, because handing
/// pieces to a thread costs more. All upload slots together need 8 MiB for this.
const SMALL_NAR: usize = 256 * 1024;

#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredUpload {
    /// Its compressed file.
    pub(crate) nar: StoredNar,
    /// Whether the NAR was stored already.
    pub(crate) known: bool,
    pub(crate) received: u64,
}

/// Receives a path with the announced hash and size of its NAR, and makes it visible. A NAR that is
/// stored already is read completely all the same: a client that claims a NAR must have it.
///
/// # Errors
/// 400 if it is not what was announced, 503 if its NAR was removed during the upload.
pub(crate) async fn receive_announced(
    state: &ServerState,
    body: &mut RequestBody,
    cache: &CacheName,
    path: PathInfo,
) -> Result<StoredUpload, ErrorResponse> {
    let (cache, level) = (cache.clone(), state.options.level);
    if let Some(size) = usize::try_from(path.nar_size)
        .ok()
        .filter(|size| *size <= SMALL_NAR)
    {
        // No other thread is involved until the NAR is complete.
        let (nar, compressors) = (body.up_to(size).await?, Arc::clone(&state.compressors));
        return state
            .run_inline(move |store| store_small(store, &compressors, &cache, &path, &nar))
            .await;
    }
    let (path, known, options) = state
        .run_blocking(move |store| {
            prepare(store, &path, level).map(|(known, options)| (path, known, options))
        })
        .await?;
    let taken = ingest(body, options)
        .await?
        .map_err(|error| refuse(error, path.nar_size))?;
    state
        .run_blocking(move |store| store_ingested(store, &cache, &path, known, taken))
        .await
}

fn store_small(
    store: &Store,
    compressors: &CompressorPool,
    cache: &CacheName,
    path: &PathInfo,
    nar: &[u8],
) -> Result<StoredUpload, ErrorResponse> {
    let received = nar.len() as u64;
    // `up_to` stops after the announced size, so the hash of the rest is unknown.
    if received > path.nar_size {
        return Err(refuse(IngestError::TooLong, path.nar_size));
    }
    // Checked before anything is written.
    check(path, received, Sha256(sha2::Sha256::digest(nar).into()))?;
    NarValidator::check(nar).map_err(|error| refuse(IngestError::NoNar(error), path.nar_size))?;
    let known = store.known_nar(&path.nar_hash)?;
    // Compress only what is not stored already.
    let stored = match known {
        Some(known) => known,
        None => store.publish_compressed(&compressors.compress(nar)?, &path.nar_hash)?,
    };
    finish(
        store,
        cache,
        path,
        StoredUpload {
            nar: stored,
            known: known.is_some(),
            received,
        },
    )
}

fn prepare(
    store: &Store,
    path: &PathInfo,
    level: i32,
) -> io::Result<(Option<StoredNar>, IngestOptions)> {
    let known = store.known_nar(&path.nar_hash)?;
    // A known NAR is only hashed, to check that the client has it.
    let target = known
        .is_none()
        .then(|| store.folder().temporary())
        .transpose()?;
    Ok((
        known,
        IngestOptions {
            format: Format::None,
            nar_size: Some(path.nar_size),
            target,
            level,
        },
    ))
}

fn store_ingested(
    store: &Store,
    cache: &CacheName,
    path: &PathInfo,
    known: Option<StoredNar>,
    taken: IngestedNar,
) -> Result<StoredUpload, ErrorResponse> {
    check(path, taken.nar_size, taken.nar_hash)?;
    let nar = match (known, taken.stored) {
        // The stored file stays; what was received only proved that the client has the NAR.
        (Some(nar), _) => nar,
        (None, Some((file, nar))) => store.publish_nar(file, &path.nar_hash, nar)?,
        // `prepare` gives a target whenever the NAR is unknown.
        (None, None) => {
            return Err(ErrorResponse::internal(&io::Error::other(
                "a NAR was read and not stored",
            )));
        }
    };
    finish(
        store,
        cache,
        path,
        StoredUpload {
            nar,
            known: known.is_some(),
            received: taken.received_size,
        },
    )
}

/// Checks that a NAR is what was announced.
fn check(path: &PathInfo, received: u64, hash: Sha256) -> Result<(), ErrorResponse> {
    if received != path.nar_size {
        let announced = path.nar_size;
        return Err(wrong_nar(&format!(
            "{received} bytes were received, but {announced} were announced"
        )));
    }
    if hash != path.nar_hash {
        return Err(wrong_nar(&format!(
            "the received NAR has {hash}, but {} was announced",
            path.nar_hash
        )));
    }
    Ok(())
}

fn finish(
    store: &Store,
    cache: &CacheName,
    path: &PathInfo,
    stored: StoredUpload,
) -> Result<StoredUpload, ErrorResponse> {
    claim(store, cache, path, stored.nar)?;
    Ok(stored)
}

/// Makes a path visible whose NAR is stored.
fn claim(
    store: &Store,
    cache: &CacheName,
    path: &PathInfo,
    nar: StoredNar,
) -> Result<(), ErrorResponse> {
    check_content_address(store, path)?;
    if store.commit(cache, path, nar)? {
        Ok(())
    } else {
        Err(removed())
    }
}

/// # Errors
/// 400 if the path's content address contradicts its stored NAR, its name or its references.
pub(crate) fn check_content_address(store: &Store, path: &PathInfo) -> Result<(), ErrorResponse> {
    match contradiction(store, path)? {
        Some(problem) => Err(ErrorResponse::bad_request(format!(
            "the content address (`CA`) of `{}` {problem}",
            path.path
        ))),
        None => Ok(()),
    }
}

/// Receives a NAR of which only the compressed file's hash is known, and stores it.
///
/// # Errors
/// 400 if it does not match its name, or cannot be decompressed.
pub(crate) async fn receive_compressed(
    state: &ServerState,
    body: &mut RequestBody,
    format: Format,
    received_hash: Sha256,
) -> Result<IngestedNar, ErrorResponse> {
    let target = Some(
        state
            .run_blocking(|store| store.folder().temporary())
            .await?,
    );
    let options = IngestOptions {
        format,
        nar_size: None,
        target,
        level: state.options.level,
    };
    let mut taken = ingest(body, options)
        .await?
        .map_err(|error| refuse(error, 0))?;
    // Nix names an uploaded file after its hash, so this detects a damaged transfer.
    if taken.received_hash != received_hash {
        return Err(wrong_nar(&format!(
            "the received file has {}, but its name has {received_hash}",
            taken.received_hash
        )));
    }
    if let Some((file, nar)) = taken.stored.take() {
        let hash = taken.nar_hash;
        state
            .run_blocking(move |store| store.publish_nar(file, &hash, nar))
            .await?;
    }
    Ok(taken)
}

/// Makes a path visible.
///
/// # Errors
/// 400 if its content address is wrong, 503 if its NAR has been removed.
pub(crate) async fn commit(
    state: &ServerState,
    cache: &CacheName,
    path: PathInfo,
    nar: StoredNar,
) -> Result<(), ErrorResponse> {
    let cache = cache.clone();
    state
        .run_blocking(move |store| claim(store, &cache, &path, nar))
        .await
}

fn removed() -> ErrorResponse {
    ErrorResponse::unavailable("the NAR was removed before it was claimed; send it again")
}

/// Rejects a body that cannot be correct before reading it.
///
/// # Errors
/// 400 if it is empty or its announced length differs from `expected`.
pub(crate) fn check_length(
    headers: &HeaderMap,
    expected: Option<u64>,
) -> Result<(), ErrorResponse> {
    // With chunked encoding the length is known only at the end.
    let Some(length) = headers.get(header::CONTENT_LENGTH) else {
        return Ok(());
    };
    let length: Option<u64> = length.to_str().ok().and_then(|text| text.parse().ok());
    match (length, expected) {
        (Some(0), _) => Err(ErrorResponse::bad_request("the request has no body")),
        (Some(length), Some(expected)) if length != expected => Err(wrong_nar(&format!(
            "`Content-Length` is {length}, but {expected} bytes were announced"
        ))),
        _ => Ok(()),
    }
}

/// Uses Attic's message, which clients match.
fn wrong_nar(problem: &str) -> ErrorResponse {
    ErrorResponse::bad_request(format!("Bad NAR Hash or Size: {problem}"))
}

fn refuse(error: IngestError, announced: u64) -> ErrorResponse {
    match error {
        IngestError::TooLong => wrong_nar(&format!(
            "more than the announced {announced} bytes were received"
        )),
        IngestError::Corrupt(problem) => {
            ErrorResponse::bad_request(format!("the NAR cannot be decompressed: {problem}"))
        }
        IngestError::OutOfProportion => ErrorResponse::bad_request(
            "the NAR unpacks to a thousand times what was received, and its size was not announced; add \
             `?compression=none` to the store's URL",
        ),
        IngestError::NoNar(error) => wrong_nar(&format!("what was received is no NAR: {error}")),
        IngestError::Compressed(name) => upload_name::unsupported(Some(name)),
        IngestError::Disk(error) => ErrorResponse::internal(&error),
        IngestError::Abandoned => {
            ErrorResponse::bad_request("the request's body ended before its announced length")
        }
    }
}
