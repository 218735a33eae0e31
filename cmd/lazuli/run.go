package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"lazuli/fs/bundle"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

func newRunCommand(a *app) *cobra.Command {
	var (
		o      bundle.Options
		env    []string
		binds  []string
		net    string
		tl     string
		fill   bool
		always bool
	)
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [ARG…]",
		Short: "Start an image's process from a lazy root",
		Long: `Run mounts IMAGE with a writable layer and starts its process through runc or crun before the image's
files are here: they are fetched when they are read. ARGs replace the command of the image's config; its entrypoint stays.
When the process ends, the container and what it wrote are removed. What was fetched stays for the next time.

IMAGE is NAME[:TAG] of a registry (with docker's credentials), oci:DIR[:TAG] or docker-archive:FILE[:TAG].
Layers that are not lazy are fetched whole first, and a line says so.

The container has a network of its own with nothing but the loopback device, unless --net host. It has a terminal
if stdin and stdout are terminals. Signals are passed on; the second SIGINT or SIGTERM kills. The exit code is that of the
process, 128+n if signal n ended it; 125 if it could not be started, 126 if the command cannot be executed, 127 if there is none.`,
		Example: `  lazuli run localhost:5000/python:lazy python3 -c 'print("hello")'
  lazuli run -e DEBUG=1 -w /src -v .:/src:ro --net host registry.example.com/app:1-lazy make test
  lazuli run -u nobody oci:./lazy id
  lazuli run --timeline localhost:5000/python:lazy python3 -c 'import numpy'`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if o.Env, err = environment(env); err != nil {
				return err
			}
			for _, b := range binds {
				bind, err := bundle.ParseBind(b)
				if err != nil {
					return &exitError{125, err}
				}
				o.Binds = append(o.Binds, bind)
			}
			switch net {
			case "host":
				o.HostNetwork = true
			case "none":
			default:
				return &usageError{fmt.Errorf("run: --net %s: want host or none", net)}
			}
			line, err := newTimeline(tl)
			if err != nil {
				return err
			}
			o.Args = args[1:]
			code, err := a.runImage(cmd, args[0], o, line, fill)
			var start *bundle.StartError
			switch {
			case errors.As(err, &start) && start.Said:
				return &exitError{start.Code, fmt.Errorf("run %s: the process was not started, for the reason above", args[0])}
			case errors.As(err, &start):
				return &exitError{start.Code, fmt.Errorf("run %s: %w", args[0], start)}
			case err != nil && cmd.Context().Err() != nil:
				return err // says which signal
			case err != nil:
				return &exitError{125, err}
			case code != 0:
				return &exitError{code: code}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringArrayVarP(&env, "env", "e", nil, "set an environment variable, `NAME=value`; NAME alone has the value it has here")
	f.StringVarP(&o.Dir, "workdir", "w", "", "working `DIR` in the container")
	f.StringVarP(&o.User, "user", "u", "", "`USER[:GROUP]`, names as in the image's /etc/passwd or numbers")
	f.StringArrayVarP(&binds, "volume", "v", nil, "show a file or directory of the host, `SRC:DST[:ro]`")
	f.StringVar(&net, "net", "none", "network: none or host")
	f.StringVar(&o.Hostname, "hostname", "", "`NAME` of the host in the container")
	f.BoolVar(&always, "rm", true, "remove the container when it ends, which is always done")
	f.BoolVar(&fill, "fill", false, "fetch the rest of the image in the background")
	f.StringVar(&tl, "timeline", "", "print when each phase ended: `text`, json, or json:FILE; stdout and stderr\nthen go through pipes, so that the first output can be seen, and there is no terminal")
	f.Lookup("timeline").NoOptDefVal = "text"
	cmd.RegisterFlagCompletionFunc("net", cobra.FixedCompletions([]string{"none", "host"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// environment is what -e says, with this process's values for names that come alone. A name that is not
// set here is left out, as docker does.
func environment(flags []string) ([]string, error) {
	var env []string
	for _, kv := range flags {
		name, _, ok := strings.Cut(kv, "=")
		if name == "" || strings.Contains(kv, "\x00") {
			return nil, &usageError{fmt.Errorf("run: -e %q: want NAME=value, or NAME", kv)}
		}
		if !ok {
			value, set := os.LookupEnv(name)
			if !set {
				continue
			}
			kv += "=" + value
		}
		env = append(env, kv)
	}
	return env, nil
}

// runImage mounts the image, runs its process, and takes both down again.
func (a *app) runImage(cmd *cobra.Command, image string, o bundle.Options, line *timeline, fill bool) (code int, err error) {
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	ref, err := remote.ParseReference(image)
	if err != nil {
		return 0, err
	}
	if _, err := bundle.Runtime(); err != nil {
		return 0, err
	}
	h, err := a.host(stderr)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	if err := bundle.Sweep(a.bundles()); err != nil {
		a.logger(stderr).Warn("containers of a lazuli that was killed", "err", err)
	}
	m, err := h.mount(ctx, ref, "", true, fill, true, stderr)
	if err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, m.close())
		if line != nil && err == nil {
			err = line.print(stderr, m, image, code)
		}
	}()

	stdio := bundle.IO{Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: stderr}
	o.Terminal = line == nil && isTerminal(stdio.Stdin) && isTerminal(stdio.Stdout)
	if line != nil {
		stdio.Stdout, stdio.Stderr = line.output(stdio.Stdout), line.output(stdio.Stderr)
		stdio.Started = func(int) { line.mark(phaseExec, time.Now()) }
	}
	spec, err := bundle.Config(m.config, m.dir, o)
	if err != nil {
		return 0, fmt.Errorf("%v: %w", ref, err)
	}
	stdio.Signals = a.divert()
	code, err = bundle.Run(ctx, a.bundles(), spec, stdio)
	if line != nil && err == nil {
		line.mark(phaseExit, time.Now())
	}
	return code, err
}

// fillBehind fetches what is not here until stop is called.
func fillBehind(ctx context.Context, r *rootfs.Rootfs, a *app, stderr io.Writer) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Fill(ctx); err != nil && ctx.Err() == nil {
			a.logger(stderr).Warn("fetching the rest of the image", "err", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
