// Lazuli starts containers before their images have arrived.
//
// This is its one program. Each verb has a file of its own, which turns flags
// into a call of the package that does the work and its result into text or JSON.
//
// Exit codes: 0 is success, 1 a failure, 2 a wrong command line, 128+n an end by signal n.
// lazuli run has those of the container's process, and docker's 125, 126 and 127
// when that did not run.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// version is set by the Makefile.
var version = "devel"

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is main with its outcome as a value.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	a := &app{}
	ctx := a.catch()
	defer func() { a.release() }() // the one that holds then: a command may have called it
	cmd := newRootCommand(a)
	cmd.SetArgs(args)
	cmd.SetIn(stdin)
	cmd.SetOut(stdout)
	cmd.SetErr(stderr)
	err := cmd.ExecuteContext(ctx)
	var exit *exitError
	var caught *signalError
	var usage *usageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		if exit.err != nil {
			fmt.Fprintf(printable(stderr), "lazuli: %v%s\n", exit.err, advice(exit.err))
		}
		return exit.code
	case errors.As(context.Cause(ctx), &caught):
		fmt.Fprintf(stderr, "lazuli: %v\n", caught)
		return 128 + int(caught.signal)
	case errors.As(err, &usage):
		fmt.Fprintf(printable(stderr), "lazuli: %v\n", err)
		return 2
	}
	fmt.Fprintf(printable(stderr), "lazuli: %v%s\n", err, advice(err))
	return 1
}

// advice is what to do about an error whose own words do not say it.
func advice(err error) string {
	if errors.Is(err, unix.ENOSPC) {
		return ": make room (lazuli images, rmi, prune), or choose another disk with --root or TMPDIR"
	}
	return ""
}

// parseReference parses an argument that names an image.
func parseReference(s string) (remote.Reference, error) {
	ref, err := remote.ParseReference(s)
	if err != nil {
		return ref, &usageError{err}
	}
	return ref, nil
}

// An app is what the verbs share: the flags that all of them have, and signals.
type app struct {
	config
	signals chan os.Signal
	release func()
}

// An exitError ends the program with a code, silently if err is nil.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

type signalError struct{ signal unix.Signal }

func (e *signalError) Error() string { return "stopped by " + unix.SignalName(e.signal) }

type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }

// catch returns a context that ends at the first SIGINT or SIGTERM; at the
// second the program ends where it is. What that leaves mounted, the next one that opens the root folder removes.
func (a *app) catch() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	a.signals = make(chan os.Signal, 2)
	signal.Notify(a.signals, unix.SIGINT, unix.SIGTERM)
	done := make(chan struct{})
	go func() {
		for n := 0; ; n++ {
			select {
			case s := <-a.signals:
				if n > 0 {
					os.Exit(128 + int(s.(unix.Signal)))
				}
				cancel(&signalError{s.(unix.Signal)})
			case <-done:
				return
			}
		}
	}()
	a.release = func() {
		signal.Stop(a.signals)
		close(done)
	}
	return ctx
}

// divert gives signals to a container's process from here on.
func (a *app) divert() <-chan os.Signal {
	c := make(chan os.Signal, 16)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGCONT)
	signal.Stop(a.signals)
	return c
}

func newRootCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lazuli",
		Short: "Start containers before their images have arrived",
		Long: `Lazuli starts a container before its image has arrived. It converts images so that their
layers can be read piece by piece, mounts them at once, and fetches what is read when it is read.`,
		Example: `  lazuli doctor                                            # can this machine do it?
  lazuli convert python:3.12 localhost:5000/python:lazy
  lazuli run localhost:5000/python:lazy python3 -c 'print("hello")'`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := "lazuli --help lists the commands"
			if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
				hint = "did you mean " + strings.Join(s, " or ") + "?"
			}
			return fmt.Errorf("unknown command %q: %s", args[0], hint)
		},
		RunE:                       func(cmd *cobra.Command, args []string) error { return cmd.Help() },
		PersistentPreRunE:          func(cmd *cobra.Command, args []string) error { return a.load(cmd.Flags()) },
		SuggestionsMinimumDistance: 2,
	}
	a.flags(cmd.PersistentFlags())
	cmd.AddCommand(
		newConvertCommand(),
		newRunCommand(a), newMountCommand(a), newUmountCommand(a),
		newInspectCommand(a), newCheckCommand(a),
		newImagesCommand(a), newRmiCommand(a), newPruneCommand(a),
		newProfileCommand(a), newDaemonCommand(a), newStatusCommand(a), newInstallCommand(a), newUninstallCommand(a),
		newRegistryCommand(a), newDoctorCommand(a), newVersionCommand(),
	)
	for _, c := range append(cmd.Commands(), cmd) {
		args := c.Args
		c.Args = func(cmd *cobra.Command, a []string) error {
			if err := args(cmd, a); err != nil {
				if cmd.HasParent() {
					err = fmt.Errorf("%s: %w\nusage: %s", cmd.Name(), err, cmd.UseLine())
				}
				return &usageError{err}
			}
			return nil
		}
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if cmd.HasParent() {
			err = fmt.Errorf("%s: %w", cmd.Name(), err)
		}
		return &usageError{fmt.Errorf("%w: %s --help lists the flags", err, cmd.CommandPath())}
	})
	return cmd
}

// open opens the node's root folder.
func (a *app) open(stderr io.Writer) (*rootfs.Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("mounting needs root: run it with sudo (lazuli doctor says what else is missing)")
	}
	return rootfs.Open(a.Root, rootfs.Options{Logger: a.logger(stderr), ReadTimeout: a.ReadTimeout.Duration, Hosts: a.HostsDir})
}

func (a *app) logger(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: a.level}))
}

// bundles is where containers that run have their runtime's files.
func (a *app) bundles() string { return filepath.Join(a.Root, "bundles") }
