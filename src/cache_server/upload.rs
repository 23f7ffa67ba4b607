//! From an arriving body to a path that can be served: the part that both protocols share.

use std::io;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use sha2::Digest as _;

use crate::cache_server::body::Incoming;
use crate::cache_server::ingest::{Format, Plan, Stop, Taken, ingest};
use crate::cache_server::pack::Packers;
use crate::cache_server::refusal::Refusal;
use crate::cache_server::state::State;
use crate::cache_server::store::{Store, StoredNar};
use crate::nix::cache_name::CacheName;
use crate::nix::hash::Sha256;
use crate::nix::path_info::PathInfo;

/// A NAR up to this size, in bytes, is read whole before it is worked on: handing pieces to a thread costs more.
/// So many uploads as may be under way at once need 8 MiB for it.
const WHOLE: usize = 256 * 1024;

/// What became of a NAR.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    /// Its compressed file.
    pub nar: StoredNar,
    /// Whether it was here already.
    pub known: bool,
    /// Bytes that came.
    pub came: u64,
}

/// Takes a path whose NAR's hash and size are announced, and makes it visible. Even if the NAR is known already all of
/// it is read: who claims a NAR must have it.
///
/// # Errors
/// 400 when it is not what was announced, 503 when its NAR was removed meanwhile.
pub async fn announced(
    state: &State,
    body: &mut Incoming,
    cache: &CacheName,
    path: PathInfo,
) -> Result<Settled, Refusal> {
    let (cache, level) = (cache.clone(), state.options.level);
    if let Some(size) = usize::try_from(path.nar_size)
        .ok()
        .filter(|size| *size <= WHOLE)
    {
        let (nar, packers) = (body.up_to(size).await?, Arc::clone(&state.packers));
        return state
            .brief(move |store| whole(store, &packers, &cache, &path, &nar))
            .await;
    }
    let (path, known, plan) = state
        .blocking(move |store| {
            prepare(store, &path, level).map(|(known, plan)| (path, known, plan))
        })
        .await?;
    let taken = ingest(body, plan)
        .await?
        .map_err(|stop| refuse(stop, path.nar_size))?;
    state
        .blocking(move |store| settle(store, &cache, &path, known, taken))
        .await
}

fn whole(
    store: &Store,
    packers: &Packers,
    cache: &CacheName,
    path: &PathInfo,
    nar: &[u8],
) -> Result<Settled, Refusal> {
    let came = nar.len() as u64;
    if came > path.nar_size {
        return Err(refuse(Stop::TooLong, path.nar_size));
    }
    check(path, came, Sha256(sha2::Sha256::digest(nar).into()))?;
    let known = store.known_nar(&path.nar_hash)?;
    let stored = match known {
        Some(known) => known,
        None => store.publish_packed(&packers.pack(nar)?, &path.nar_hash)?,
    };
    finish(
        store,
        cache,
        path,
        Settled {
            nar: stored,
            known: known.is_some(),
            came,
        },
    )
}

fn prepare(store: &Store, path: &PathInfo, level: i32) -> io::Result<(Option<StoredNar>, Plan)> {
    let known = store.known_nar(&path.nar_hash)?;
    let target = known
        .is_none()
        .then(|| store.folder().temporary())
        .transpose()?;
    Ok((
        known,
        Plan {
            format: Format::None,
            nar_size: Some(path.nar_size),
            target,
            level,
        },
    ))
}

fn settle(
    store: &Store,
    cache: &CacheName,
    path: &PathInfo,
    known: Option<StoredNar>,
    taken: Taken,
) -> Result<Settled, Refusal> {
    check(path, taken.nar_size, taken.nar_hash)?;
    let nar = match (known, taken.stored) {
        (Some(nar), _) => nar,
        (None, Some((file, nar))) => store.publish_nar(file, &path.nar_hash, nar)?,
        (None, None) => {
            return Err(Refusal::internal(&io::Error::other(
                "a NAR was read and not stored",
            )));
        }
    };
    finish(
        store,
        cache,
        path,
        Settled {
            nar,
            known: known.is_some(),
            came: taken.came_size,
        },
    )
}

/// Whether a NAR is what was announced.
fn check(path: &PathInfo, came: u64, hash: Sha256) -> Result<(), Refusal> {
    if came != path.nar_size {
        let announced = path.nar_size;
        return Err(wrong_nar(&format!(
            "{came} bytes came, {announced} were announced"
        )));
    }
    if hash != path.nar_hash {
        return Err(wrong_nar(&format!(
            "what came is {hash}, {} was announced",
            path.nar_hash
        )));
    }
    Ok(())
}

fn finish(
    store: &Store,
    cache: &CacheName,
    path: &PathInfo,
    settled: Settled,
) -> Result<Settled, Refusal> {
    if store.commit(cache, path, settled.nar)? {
        Ok(settled)
    } else {
        Err(removed())
    }
}

/// Takes a NAR of which only the compressed file's hash is known, and keeps it.
///
/// # Errors
/// 400 when it is not what its name says, or cannot be unpacked.
pub async fn packed_nar(
    state: &State,
    body: &mut Incoming,
    format: Format,
    came_hash: Sha256,
) -> Result<Taken, Refusal> {
    let target = Some(state.blocking(|store| store.folder().temporary()).await?);
    let plan = Plan {
        format,
        nar_size: None,
        target,
        level: state.options.level,
    };
    let mut taken = ingest(body, plan).await?.map_err(|stop| refuse(stop, 0))?;
    if taken.came_hash != came_hash {
        return Err(wrong_nar(&format!(
            "what came is {}, its name says {came_hash}",
            taken.came_hash
        )));
    }
    if taken.nar_size == 0 {
        return Err(wrong_nar("it is empty"));
    }
    if let Some((file, nar)) = taken.stored.take() {
        let hash = taken.nar_hash;
        state
            .blocking(move |store| store.publish_nar(file, &hash, nar))
            .await?;
    }
    Ok(taken)
}

/// Makes a path visible.
///
/// # Errors
/// 503 when its NAR was removed meanwhile.
pub async fn commit(
    state: &State,
    cache: &CacheName,
    path: PathInfo,
    nar: StoredNar,
) -> Result<(), Refusal> {
    let cache = cache.clone();
    if state
        .blocking(move |store| store.commit(&cache, &path, nar))
        .await?
    {
        Ok(())
    } else {
        Err(removed())
    }
}

fn removed() -> Refusal {
    Refusal::busy("the NAR was removed before it was claimed; send it again")
}

/// Refuses a body that cannot be right, before it is read.
///
/// # Errors
/// 400 when it is empty or announced with another length than `expected`.
pub fn check_length(headers: &HeaderMap, expected: Option<u64>) -> Result<(), Refusal> {
    let Some(length) = headers.get(header::CONTENT_LENGTH) else {
        return Ok(());
    };
    let length: Option<u64> = length.to_str().ok().and_then(|text| text.parse().ok());
    match (length, expected) {
        (Some(0), _) => Err(Refusal::request("the request has no body")),
        (Some(length), Some(expected)) if length != expected => Err(wrong_nar(&format!(
            "`Content-Length` is {length}, {expected} bytes were announced"
        ))),
        _ => Ok(()),
    }
}

/// Attic's words, which clients look for.
fn wrong_nar(problem: &str) -> Refusal {
    Refusal::request(format!("Bad NAR Hash or Size: {problem}"))
}

fn refuse(stop: Stop, announced: u64) -> Refusal {
    match stop {
        Stop::TooLong => wrong_nar(&format!("more than the announced {announced} bytes came")),
        Stop::Packing(problem) => {
            Refusal::request(format!("the NAR cannot be unpacked: {problem}"))
        }
        Stop::Disk(error) => Refusal::internal(&error),
        Stop::Abandoned => Refusal::request("the request's body ended before its announced length"),
    }
}
