//! What holds over all combinations of facts and inputs.

use super::*;

/// Every combination of the facts.
fn machines() -> Vec<Machine> {
    let mut machines = vec![
        Machine::bare(),
        Machine::bare().root(),
        Machine::bare().debian(),
        Machine::bare().debian().root(),
    ];
    let mut each = |vary: &dyn Fn(&Machine) -> Vec<Machine>| {
        machines = machines.iter().flat_map(vary).collect();
    };
    each(&|machine| vec![machine.clone(), machine.clone().namespaces()]);
    each(&|machine| vec![machine.clone(), machine.clone().socket()]);
    each(&|machine| {
        let programs = ["/usr/bin/nix", "/nix/var/nix/profiles/default/bin/nix"];
        let found = programs.map(|program| machine.clone().nix(program));
        [vec![machine.clone()], found.to_vec()].concat()
    });
    each(&|machine| {
        let sudo = [
            Sudo::Untried("/s".into()),
            Sudo::Allowed("/s".into()),
            Sudo::Refused("no".into()),
        ];
        let sudo = sudo.into_iter().filter(|_| !machine.user.is_root());
        let with = sudo.map(|sudo| Machine {
            sudo,
            ..machine.clone()
        });
        std::iter::once(machine.clone()).chain(with).collect()
    });
    each(&|machine| {
        let folders = [
            machine.folder.clone(),
            Folder::Empty {
                writable: true,
                owner: 1,
            },
            Folder::Empty {
                writable: false,
                owner: 1,
            },
            Folder::Used {
                writable: true,
                owner: 1,
            },
            Folder::Used {
                writable: false,
                owner: 1,
            },
            Folder::ReadOnly,
            Folder::NoExec,
            linked(),
            Folder::NoFolder,
        ];
        folders
            .map(|folder| machine.clone().folder(folder))
            .to_vec()
    });
    each(&|machine| {
        let openings = [
            Opening::Untried,
            Opening::Local {
                no_build_users: None,
            },
            Opening::Remote,
            Opening::Denied("denied".into()),
            Opening::Closed("closed".into()),
        ];
        // What was not found was not opened.
        let openings = openings
            .into_iter()
            .take(if machine.nix.is_some() { 5 } else { 1 });
        openings
            .map(|opening| machine.clone().opening(opening))
            .collect()
    });
    machines
}

#[test]
fn no_combination_of_facts_breaks_a_promise() {
    let machines = machines();
    assert!(machines.len() > 2000, "{}", machines.len());
    let installers = [
        Installer::Auto,
        Installer::Closure,
        Installer::Tarball,
        Installer::Distro,
        Installer::None,
    ];
    for machine in &machines {
        for installer in installers {
            for (daemon, alone) in [(false, false), (false, true), (true, true)] {
                let wanted = Wanted {
                    installer,
                    daemon,
                    is_for_children_alone: alone,
                    ..Wanted::default()
                };
                keeps_its_promises(machine, &wanted);
            }
        }
    }
}

fn keeps_its_promises(machine: &Machine, wanted: &Wanted) {
    let planned = plan(machine, wanted);
    let at = format!("{planned:?} for {machine:?}, {wanted:?}");
    let root = machine.user.is_root();
    match planned {
        Plan::Ready => assert!(machine.nix.is_some(), "there is no Nix: {at}"),
        Plan::Repair(steps) => assert!(machine.nix.is_some() && !steps.is_empty(), "{at}"),
        Plan::Install(InstallPlan {
            preparation, ways, ..
        }) => {
            assert!(machine.nix.is_none() && !ways.is_empty(), "{at}");
            assert!(
                wanted.installer != Installer::None,
                "it was forbidden: {at}"
            );
            assert!(!ways.contains(&Way::Distro) || root, "{at}");
            let sudo = preparation != Preparation::Nothing;
            assert!(!sudo || matches!(machine.sudo, Sudo::Allowed(_)), "{at}");
            assert!(
                !sudo || !machine.folder.is_usable(),
                "sudo is of no use: {at}"
            );
            let writes = ways != [Way::Distro];
            assert!(!writes || sudo || machine.folder.is_usable(), "{at}");
        }
        Plan::Rootless(_) => assert!(
            !root && wanted.is_for_children_alone && machine.namespaces == Namespaces::Allowed,
            "{at}"
        ),
        Plan::Impossible(Impossible { obstacle, remedy }) => {
            assert!(!obstacle.is_empty() && remedy.ends_with('.'), "{at}");
        }
    }
}
