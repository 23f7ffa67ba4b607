//! The journal with real Nix: what a job cannot send because its cache is away, and what a killed job leaves, the next
//! job on the host publishes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::world::cache::Cache;
use crate::world::{PATH, broken, flake, flywheel, folders, need, processes, with_private_nix};

/// What the journal's part of a message is.
const KEPT: &str = "kept for the next job (journal)";

/// A runner host: a store and a home that outlive its jobs.
struct Host {
    folder: tempfile::TempDir,
}

/// How a job is to reach its cache.
#[derive(Clone)]
struct Access {
    variables: Vec<(String, String)>,
}

impl Access {
    fn new(cache: &Cache) -> Self {
        Self::at(&cache.url, cache)
    }

    /// The cache, at another address.
    fn at(url: &str, cache: &Cache) -> Self {
        let named = [
            ("ATTIC_SERVER", url),
            ("ATTIC_PUBLIC_KEY", cache.key.as_str()),
            ("ATTIC_TOKEN", cache.token.as_str()),
            ("FLYWHEEL_PUSH_CACHE", "true"),
        ];
        let owned = named.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self {
            variables: owned.into(),
        }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.retain(|(known, _)| known != name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// How a job ended, and what it reported.
struct Ended {
    code: Option<i32>,
    text: String,
    outputs: String,
    summary: String,
}

impl Ended {
    fn output(&self, name: &str) -> &str {
        let mut lines = self.outputs.lines();
        lines
            .find(|line| line.starts_with(&format!("{name}<<")))
            .and_then(|_| lines.next())
            .unwrap_or_else(|| panic!("no `{name}` in:\n{}\n{}", self.outputs, self.text))
    }
}

impl Host {
    fn new() -> Self {
        need("nix", "apt-get install nix-bin");
        let folder = tempfile::tempdir().unwrap();
        for name in ["home", "nix", "work", "temp"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        flake::write(&folder.path().join("work"));
        let payload = json!({
            "ref": "refs/heads/main", "after": "1".repeat(40), "deleted": false,
            "repository": { "full_name": "octo-org/app", "default_branch": "main" },
        });
        fs::write(folder.path().join("event.json"), payload.to_string()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A `nix-job` on a push to the default branch, still to be started.
    fn job(&self, access: &Access, tracking: &str, command: &str) -> Command {
        let mut step = with_private_nix(&self.path("nix"), &flywheel());
        folders::isolate(&mut step, self.folder.path())
            .args(["nix-job", "--command", command])
            .current_dir(self.path("work"))
            .env("PATH", PATH)
            .env("RUNNER_TEMP", self.path("temp"))
            .env("RUNNER_TRACKING_ID", tracking)
            .env("GITHUB_ACTIONS", "true")
            .env("CI", "true")
            .env("GITHUB_EVENT_NAME", "push")
            .env("GITHUB_REF", "refs/heads/main")
            .env("GITHUB_REPOSITORY", "octo-org/app")
            .env("GITHUB_EVENT_PATH", self.path("event.json"))
            .envs(access.variables.iter().cloned());
        for name in ["GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"] {
            let _ = fs::remove_file(self.path(name));
            step.env(name, self.path(name));
        }
        step.stdin(Stdio::null());
        step
    }

    fn run(&self, access: &Access, command: &str) -> Ended {
        let output = self.job(access, &tracking(), command).output().unwrap();
        self.ended(&output)
    }

    fn ended(&self, output: &Output) -> Ended {
        let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
        Ended {
            code: output.status.code(),
            text: text.concat(),
            outputs: fs::read_to_string(self.path("GITHUB_OUTPUT")).unwrap_or_default(),
            summary: fs::read_to_string(self.path("GITHUB_STEP_SUMMARY")).unwrap_or_default(),
        }
    }

    fn journals(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("state/flywheel/journal"));
        let files = entries.into_iter().flatten().flatten();
        files
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|found| found == "journal"))
            .collect()
    }

    /// The valid paths with this in their name, as Nix's database has them.
    fn valid(&self, part: &str) -> Vec<String> {
        let file = self.path("nix/var/nix/db/db.sqlite");
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
        let Ok(db) = rusqlite::Connection::open_with_flags(file, flags) else {
            return Vec::new();
        };
        let query = "select path from ValidPaths where path like ?1 and path not like '%.drv'";
        let Ok(mut rows) = db.prepare(query) else {
            return Vec::new();
        };
        let names = rows
            .query_map([format!("%{part}%")], |row| row.get::<_, String>(0))
            .unwrap();
        names
            .map(|path| path.unwrap()["/nix/store/".len() + 33..].to_owned())
            .collect()
    }
}

fn tracking() -> String {
    format!("github_{:032x}", fastrand::u128(..))
}

/// The runner's end of a job, whatever becomes of the test.
struct Tracked(String);

impl Tracked {
    fn variable(&self) -> String {
        format!("RUNNER_TRACKING_ID={}", self.0)
    }

    fn is_alive(&self) -> bool {
        !processes::with_variable(&self.variable()).is_empty()
    }

    fn kill(&self) {
        processes::kill_with_variable(&self.variable());
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.kill();
    }
}

const BUILD: &str = "nix build --no-link path:.#app";

fn has_app(cache: &Cache) -> bool {
    ["base", "lib", "app"]
        .iter()
        .all(|name| cache.names().contains(&(*name).to_owned()))
}

/// A job that can send nothing names each path as lost and keeps it; the next one with the same cache sends it.
fn kept_and_taken_up(host: &Host, away: &Access, back: &Access, cache: &Cache) {
    let away = away.clone().with("FLYWHEEL_REQUIRE_PUBLISH", "true");
    let ended = host.run(&away, BUILD);
    assert_eq!(ended.code, Some(1), "{}", ended.text);
    assert_eq!(ended.output("outcome"), "not-published", "{}", ended.text);
    let lost: usize = ended.output("lost").parse().unwrap();
    assert!(lost >= 3, "{}", ended.text);
    let said = ended.text.lines().find(|line| {
        line.contains("title=lost::") && line.contains("-app: ") && line.contains(KEPT)
    });
    assert!(said.is_some(), "{}", ended.text);
    assert!(ended.summary.contains(KEPT), "{}", ended.summary);
    assert_eq!(host.journals().len(), 1, "{}", ended.text);
    assert!(!has_app(cache));

    let next = host.run(back, "true");
    assert_eq!(
        (next.code, next.output("lost")),
        (Some(0), "0"),
        "{}",
        next.text
    );
    assert!(
        next.text.contains("of earlier jobs taken up"),
        "{}",
        next.text
    );
    assert!(has_app(cache), "{:?}\n{}", cache.names(), next.text);
    assert_eq!(host.journals(), Vec::<PathBuf>::new(), "{}", next.text);
}

#[test]
fn what_a_cache_that_is_away_did_not_take_the_next_job_sends() {
    let (host, mut cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    cache.kill();
    let away = host.run(&access, BUILD);
    assert_eq!(
        (away.code, host.journals().len()),
        (Some(0), 1),
        "{}",
        away.text
    );
    // A second job without it adds nothing and loses nothing; what waits is not silent.
    let second = host.run(&access, "true");
    assert!(
        second
            .text
            .contains("what earlier jobs left stays for the next job"),
        "{}",
        second.text
    );
    cache.restart();
    let back = host.run(&access, "true");
    assert_eq!(
        (back.code, back.output("lost")),
        (Some(0), "0"),
        "{}",
        back.text
    );
    assert!(has_app(&cache), "{:?}\n{}", cache.names(), back.text);
    assert_eq!(host.journals(), Vec::<PathBuf>::new());
}

/// The same for a cache behind a network that drops everything, for Attic's own client that cannot be had, and for a
/// store of `nix copy`.
#[test]
fn each_way_of_publishing_keeps_what_it_cannot_send() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let through = broken::forward(&cache.url);
    let access = Access::at(&through.url, &cache);
    through.cut();
    let away = host.run(&access, BUILD);
    assert!(away.text.contains(KEPT), "{}", away.text);
    through.mend();
    host.run(&access, "true");
    assert!(has_app(&cache), "{:?}", cache.names());

    let (host, cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    let without_client = access
        .clone()
        .with("FLYWHEEL_PUBLISHER", "attic-client")
        .with("FLYWHEEL_ATTIC_CLIENT", "path:/nonexistent#attic");
    kept_and_taken_up(&host, &without_client, &access, &cache);
}

#[test]
fn a_store_of_nix_copy_that_does_not_open_is_the_next_jobs() {
    let host = Host::new();
    let cache = Cache::start(&[]);
    let folder = host.path("copies");
    let access = Access::new(&cache)
        .with("ATTIC_SERVER", "")
        // The store has no signatures, and no key that they are checked with.
        .with("ATTIC_PUBLIC_KEY", "")
        .with("FLYWHEEL_CACHE", &format!("file://{}", folder.display()));
    // A file in the place of the store's folder.
    fs::write(&folder, "").unwrap();
    let away = host.run(&access, BUILD);
    assert!(away.text.contains(KEPT), "{}", away.text);
    assert_eq!(host.journals().len(), 1);
    fs::remove_file(&folder).unwrap();
    let next = host.run(&access, "true");
    assert_eq!(
        (next.code, next.output("lost")),
        (Some(0), "0"),
        "{}",
        next.text
    );
    let narinfos = fs::read_dir(&folder).unwrap().flatten();
    let narinfos =
        narinfos.filter(|entry| entry.path().extension().is_some_and(|e| e == "narinfo"));
    assert!(narinfos.count() >= 3, "{}", next.text);
    assert_eq!(host.journals(), Vec::<PathBuf>::new(), "{}", next.text);
}

/// Starts a job with a long chain of builds in it.
fn start_chain(host: &Host, access: &Access, tracking: &str, part: &str, length: u32) -> Child {
    let chain = format!(
        r#"let
  path = n: derivation {{
    name = "{part}-${{toString n}}"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo ${{if n == 0 then "" else path (n - 1)}} > $out" ];
  }};
in path {length}"#
    );
    let file = host.path("work").join(format!("{part}.nix"));
    fs::write(&file, chain).unwrap();
    let command = format!("nix-build --no-out-link --option sandbox false {part}.nix");
    let mut job = host.job(access, tracking, &command);
    job.stdout(Stdio::null()).stderr(Stdio::null());
    job.spawn().unwrap()
}

/// Flywheel is killed right after its job's build has begun, and the build lives on: nothing of it is in the journal,
/// and all of it is published.
#[test]
fn what_a_build_makes_after_flywheel_was_killed_is_the_next_jobs() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    let job = Tracked(tracking());
    let mut child = start_chain(&host, &access, &job.0, "orphan", 30);
    let begun = processes::wait_until(Duration::from_secs(60), || {
        processes::with_variable(&job.variable())
            .iter()
            .any(|process| process.command_line.starts_with("nix-build"))
    });
    assert!(begun, "the build has not begun");
    processes::signal(i32::try_from(child.id()).unwrap(), Signal::KILL);
    child.wait().unwrap();
    assert!(job.is_alive(), "the build lives on");
    let ended = processes::wait_until(Duration::from_secs(60), || !job.is_alive());
    let valid = host.valid("orphan-");
    assert!(ended && valid.len() == 31, "{valid:?}");

    let next = host.run(&access, "true");
    assert_eq!(next.output("lost"), "0", "{}", next.text);
    let served = cache.names();
    assert!(
        valid.iter().all(|name| served.contains(name)),
        "{served:?}\n{}",
        next.text
    );
    assert_eq!(host.journals(), Vec::<PathBuf>::new());
}

/// A job that publishes nothing has run since: what it added is not taken for the killed job's.
#[test]
fn what_a_read_only_job_added_is_not_taken_up() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    let job = Tracked(tracking());
    let mut child = start_chain(&host, &access, &job.0, "killed", 3);
    let built = processes::wait_until(Duration::from_secs(60), || {
        !host.valid("killed-3").is_empty()
    });
    assert!(built);
    processes::signal(i32::try_from(child.id()).unwrap(), Signal::KILL);
    child.wait().unwrap();
    job.kill();
    let reader = access.clone().with("FLYWHEEL_PUSH_CACHE", "false");
    let ended = host.run(&reader, BUILD);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert_eq!(host.valid("-app").len(), 1, "{}", ended.text);

    let next = host.run(&access, "true");
    let served = cache.names();
    assert!(
        served.contains(&"killed-3".to_owned()),
        "{served:?}\n{}",
        next.text
    );
    assert!(!has_app(&cache), "{served:?}\n{}", next.text);
    assert!(
        next.text.contains("a job of another kind began"),
        "{}",
        next.text
    );
    assert_eq!(host.journals(), Vec::<PathBuf>::new());
}

/// When the cache answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Up {
    Always,
    /// Neither for the killed job nor for the one after it.
    Later,
    /// For the job after the killed one.
    Next,
}

/// A job that was killed at a random moment.
#[derive(Debug)]
struct Killed {
    moment: Duration,
    /// Whether it had not ended by itself before.
    was_alive: bool,
    /// Whether its build was left to itself: the runner ends what is left of a job, or is killed itself and does not.
    lived_on: bool,
    /// What it had added to the store in the end.
    valid: Vec<String>,
}

impl Killed {
    fn new(host: &Host, access: &Access, part: &str) -> Self {
        let job = Tracked(tracking());
        let moment = Duration::from_millis(fastrand::u64(1..1600));
        let mut child = start_chain(host, access, &job.0, part, 60);
        let over = Instant::now() + moment;
        processes::wait_until(moment, || Instant::now() >= over);
        processes::signal(i32::try_from(child.id()).unwrap(), Signal::KILL);
        let was_alive = child.wait().unwrap().code().is_none();
        let lived_on = fastrand::bool();
        if !lived_on {
            job.kill();
        }
        let ended = processes::wait_until(Duration::from_secs(60), || !job.is_alive());
        assert!(ended, "{part}: the build does not end");
        Self {
            moment,
            was_alive,
            lived_on,
            valid: host.valid(&format!("-{part}-")),
        }
    }
}

/// `nix-job` is killed with `kill -9` at a random moment from its start on, its build with it or not; by the first job
/// that has a cache everything that was valid is published. `FLYWHEEL_KILLS` says how often.
#[test]
fn killed_at_any_moment_nothing_is_lost_and_nothing_is_silent() {
    let kills: u64 =
        std::env::var("FLYWHEEL_KILLS").map_or(9, |text| text.parse().expect("a number"));
    let (host, mut cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    let (mut is_up, mut early, mut all) = (true, 0, Vec::new());
    for seed in 0..kills {
        let up = [Up::Always, Up::Later, Up::Next][usize::try_from(seed % 3).unwrap()];
        if is_up && up != Up::Always {
            cache.kill();
            is_up = false;
        }
        let killed = Killed::new(&host, &access, &format!("kill-{seed}"));
        let before = cache.names();
        let is_begun = !host.journals().is_empty();
        // A job removes its journal once all is published, and may be killed before it has reported that.
        let is_published = killed.valid.iter().all(|name| before.contains(name));
        let is_over = is_published || !killed.was_alive;
        assert!(is_begun || is_over, "{seed}, {up:?}: {killed:?}");
        if up == Up::Later {
            let away = host.run(&access, "true").text;
            let said = "what earlier jobs left stays for the next job";
            assert_eq!(away.contains(said), is_begun, "{seed}: {killed:?}\n{away}");
        }
        if !is_up {
            cache.restart();
            is_up = true;
        }
        let next = host.run(&access, "true");
        let served = cache.names();
        let mut names = killed.valid.iter();
        let lost = names.find(|name| !served.contains(name));
        let text = &next.text;
        assert_eq!(lost, None, "{seed}, {up:?}: {killed:?}\n{text}");
        assert_eq!(next.output("lost"), "0", "{seed}: {killed:?}\n{text}");
        let journals = host.journals();
        assert!(journals.is_empty(), "{seed}: {killed:?}\n{text}");
        let was_there = |name: &&String| before.contains(name);
        early += killed.valid.iter().filter(was_there).count();
        all.push(killed);
    }
    let count = |is: fn(&Killed) -> bool| all.iter().filter(|killed| is(killed)).count();
    let paths: usize = all.iter().map(|killed| killed.valid.len()).sum();
    let moments = all.iter().map(|killed| killed.moment.as_millis());
    println!(
        "{kills} kills within {:?} to {:?} ms, {} before the first path, {} after the job's end, {} with a build that was left to itself: \
         {early} paths published before, {} taken up, none lost",
        moments.clone().min(),
        moments.max(),
        count(|killed| killed.valid.is_empty()),
        count(|killed| !killed.was_alive),
        count(|killed| killed.lived_on),
        paths - early,
    );
    assert!(paths > 0, "every kill came before the first path");
}

#[test]
fn a_malformed_hint_for_the_caches_name_sends_nothing_anywhere() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache).with("ATTIC_CACHE", "no/such");
    let ended = host.run(&access, BUILD);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert_eq!(cache.names(), Vec::<String>::new(), "{}", ended.text);
    let warned = "::warning title=hint::the runner's hint `ATTIC_CACHE` is not used";
    assert!(
        ended.text.contains(warned) && ended.text.contains("no cache is used"),
        "{}",
        ended.text
    );
    let required = access.with("FLYWHEEL_REQUIRE_PUBLISH", "true");
    let ended = host.run(&required, BUILD);
    assert_eq!(ended.output("outcome"), "not-published", "{}", ended.text);
    let malformed = required.with("FLYWHEEL_ATTIC_CACHE", "no/such");
    assert_eq!(host.run(&malformed, BUILD).code, Some(64));
}

/// Files that an earlier process may have left where Flywheel reads and locks: each is refused within a second or two,
/// with a reason, and the job goes on.
#[test]
fn pipes_in_the_place_of_files_hold_up_nothing() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let access = Access::new(&cache);
    let journal = host.path("state/flywheel/journal");
    fs::create_dir_all(&journal).unwrap();
    fs::set_permissions(
        &journal,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    let shared = host.path("temp/flywheel-0");
    fs::create_dir_all(&shared).unwrap();
    fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let usual = host.run(&access, "true");
    assert_eq!(usual.code, Some(0), "{}", usual.text);
    let took = Instant::now();
    host.run(&access, "true");
    let took = took.elapsed();

    for file in [
        journal.join("1-a.journal"),
        journal.join("lock"),
        shared.join("sweep.lock"),
    ] {
        pipe(&file);
    }
    fs::create_dir(shared.join("run-dead")).unwrap();
    pipe(&shared.join("run-dead/alive"));
    let mut job = host.job(&access, &tracking(), BUILD);
    for name in ["GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY"] {
        pipe(&host.path(name));
        job.env(name, host.path(name));
    }
    let began = Instant::now();
    let output = job.output().unwrap();
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    let text = text.concat();
    assert!(output.status.success(), "{text}");
    assert!(
        began.elapsed() < took + Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    for said in [
        "1-a.journal` is a named pipe, not a regular file; it is not read",
        "GITHUB_OUTPUT`: is a named pipe, not a regular file",
        "GITHUB_STEP_SUMMARY`: is a named pipe, not a regular file",
    ] {
        assert!(text.contains(said), "{said}\n{text}");
    }
    assert!(has_app(&cache), "{text}");
}

fn pipe(file: &Path) {
    rustix::fs::mkfifoat(rustix::fs::CWD, file, rustix::fs::Mode::from(0o600)).unwrap();
}
