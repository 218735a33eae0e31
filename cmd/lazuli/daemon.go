package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"lazuli/cmd/lazuli/internal/daemon"
	"lazuli/cmd/lazuli/internal/keeper"
	"lazuli/fs/rootfs"
)

func newDaemonCommand(a *app) *cobra.Command {
	var printConfig, teardown, serve, hold bool
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve lazy images to containerd",
		Long: `Daemon is containerd's snapshotter "lazuli": it answers at /run/lazuli/lazuli.sock, mounts images before their files are
here, and fetches what is read. lazuli install adds it to containerd's configuration and to systemd.

It is two processes: this one, the keeper, which holds the connection to the kernel, and a server, which it starts again
when that dies. Containers notice neither the death of the server, nor an upgrade (SIGHUP, or systemctl reload: both
processes become the program that lies at this one's path). When the daemon is stopped, containers keep what is here, and wait
for what is not until it is started again. --teardown stops it and unmounts everything.

When the link has been idle for 30 seconds, the daemon fetches the rest of what runs, so that it outlives its registry, and verifies the layers
by that: "fill" in the configuration.`,
		Example: `  lazuli daemon
  lazuli daemon --print-config > /etc/lazuli/config.toml
  lazuli daemon --teardown`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			n := 0
			for _, mode := range []bool{printConfig, teardown, serve, hold} {
				if mode {
					n++
				}
			}
			if n > 1 {
				return &usageError{errors.New("daemon: --print-config and --teardown are two commands: say one of them")}
			}
			if printConfig {
				_, err := fmt.Fprint(cmd.OutOrStdout(), configText)
				return err
			}
			if err := a.parseLevel("info"); err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("the daemon mounts, and that needs root: run it with sudo (lazuli doctor says what else is missing)")
			}
			switch {
			case teardown:
				return a.teardown(cmd)
			case serve:
				return a.serve(cmd)
			case hold:
				return keeper.Hold(cmd.Context())
			}
			return a.keep(cmd)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&printConfig, "print-config", false, "print a configuration file with what holds without one, and end")
	f.BoolVar(&teardown, "teardown", false, "stop the daemon, unmount everything, also under containers that run, and end")
	f.BoolVar(&serve, "serve", false, "be the server of a keeper")
	f.BoolVar(&hold, "hold", false, "hold the connection of a keeper that was stopped")
	f.MarkHidden("serve")
	f.MarkHidden("hold")
	return cmd
}

// keep is the keeper.
func (a *app) keep(cmd *cobra.Command) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.Root, 0o711); err != nil {
		return err
	}
	common := []string{self, "--root", a.Root, "--config", a.file, "--log-level", cmp.Or(a.LogLevel, "info"), "daemon"}
	if _, err := os.Stat(a.file); err != nil { // a default that is not there is not to be named
		common = []string{self, "--root", a.Root, "--log-level", cmp.Or(a.LogLevel, "info"), "daemon"}
	}
	with := func(flag string) []string { return append(common[:len(common):len(common)], flag) }
	a.release() // the keeper listens to signals itself
	a.release = func() {}
	err = keeper.Run(cmd.Context(), keeper.Options{
		Command:     with("--serve"),
		Sockets:     daemon.Sockets(a.Socket),
		Holder:      daemon.Holder(a.Socket),
		HoldCommand: with("--hold"),
		InUse:       func() bool { return rootfs.InUse(a.Root) },
		Logger:      a.logger(cmd.ErrOrStderr()),
	})
	if errors.Is(err, keeper.ErrConfig) {
		return &exitError{keeper.ExitConfig, err}
	}
	return err
}

// serve is the server of a keeper.
func (a *app) serve(cmd *cobra.Command) error {
	child, err := keeper.Inherit()
	if err != nil {
		return err
	}
	err = daemon.Serve(cmd.Context(), child, daemon.Options{
		Root:        a.Root,
		ReadTimeout: a.ReadTimeout.Duration,
		Hosts:       a.HostsDir,
		MaxSize:     int64(a.MaxSize),
		Unverified:  a.Verify != nil && !*a.Verify,
		Unlearned:   a.unlearned(),
		Share:       a.Share,
		Fill:        fillPolicies[a.Fill],
		Containerd:  a.Containerd,
		Metrics:     a.Metrics,
		Version:     version,
		Logger:      a.logger(cmd.ErrOrStderr()),
	})
	// Starting again does not help, unless somebody makes room.
	if errors.Is(err, daemon.ErrOpen) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return &exitError{keeper.ExitConfig, err}
	}
	return err
}

// teardown stops the daemon, if one runs, and unmounts everything.
func (a *app) teardown(cmd *cobra.Command) error {
	if client := daemon.Dial(a.Socket); client != nil {
		status, err := client.About(cmd.Context())
		if err != nil {
			return err
		}
		if status.Keeper <= 1 {
			return fmt.Errorf("the daemon's keeper has process id %d: stop it first", status.Keeper)
		}
		if err := unix.Kill(status.Keeper, unix.SIGTERM); err != nil {
			return fmt.Errorf("stop the keeper, process %d: %w", status.Keeper, err)
		}
		for waited := time.Duration(0); unix.Kill(status.Keeper, 0) == nil; waited += 50 * time.Millisecond {
			if waited > 30*time.Second {
				return fmt.Errorf("the keeper, process %d, does not end: stop it first", status.Keeper)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	n, err := rootfs.Teardown(a.Root)
	if err != nil {
		return err
	}
	// Who held the connection of a keeper that was stopped ends when the mount is gone.
	for waited := time.Duration(0); listens(daemon.Holder(a.Socket)) && waited < 10*time.Second; waited += 20 * time.Millisecond {
		time.Sleep(20 * time.Millisecond)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "mounts below %s that are gone now: %d\n", a.Root, n)
	return err
}

// listens reports whether a process listens at the path of a keeper's socket.
func listens(path string) bool {
	c, err := net.Dial("unixpacket", path)
	if err == nil {
		c.Close()
	}
	return err == nil
}
