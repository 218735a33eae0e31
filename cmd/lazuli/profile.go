package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"lazuli/convert"
	"lazuli/fs/bundle"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

func newProfileCommand(a *app) *cobra.Command {
	var (
		o      bundle.Options
		env    []string
		binds  []string
		until  string
		port   int
		during time.Duration
		out    string
		merge  string
		push   bool
	)
	cmd := &cobra.Command{
		Use:   "profile [flags] IMAGE [ARG…]",
		Short: "Record what a start reads, and make a startup pack of it",
		Long: `Profile runs IMAGE as lazuli run does and writes down what the process reads, in its order, until the process ends, its
output has the text of --until, something in it listens on --port, or --for is over. The profile is a list of pieces of files: it holds for later builds of the
image too. -o FILE writes it; --merge FILE adds the run to an older one, if that file is there, which counts less with each run. With
--until, --port or --for the process is killed then; a process that fails, or ends before its --until or --port, leaves no profile.

--push makes a startup pack of it, one blob with all that the start reads, and puts it beside the image into its registry. From
then on every node fetches it in one request as soon as it starts the image. A pack is trusted with nothing: what is in it
is verified like everything else, so whoever may push may refresh it. The image itself does not change.

ARGs replace the command of the image's config; its entrypoint stays.`,
		Example: `  lazuli profile --push registry.example.com/app:1-lazy
  lazuli profile --until READY --push registry.example.com/app:1-lazy
  lazuli profile --port 8080 --push registry.example.com/web:1-lazy
  lazuli profile -o app.profile registry.example.com/app:1-lazy make test
  lazuli profile pack --profile app.profile --push registry.example.com/app:2-lazy`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			switch {
			case out == "" && !push:
				return &usageError{errors.New("profile: say what is to come of it: -o FILE, --push, or both")}
			case during < 0:
				return &usageError{fmt.Errorf("profile: --for %v: want more than 0", during)}
			case cmd.Flags().Changed("port") && (port < 1 || port > 65535):
				return &usageError{fmt.Errorf("profile: --port %d: want 1 to 65535", port)}
			}
			ref, err := pushable(args[0], push)
			if err != nil {
				return err
			}
			if o.Env, err = environment(env); err != nil {
				return err
			}
			for _, b := range binds {
				bind, err := bundle.ParseBind(b)
				if err != nil {
					return &usageError{err}
				}
				o.Binds = append(o.Binds, bind)
			}
			var old *profile.Profile
			if merge != "" {
				if old, err = readProfile(merge); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
			o.Args = args[1:]
			return a.withRecorder(cmd, func(node *rootfs.Node) error {
				p, chain, image, err := a.record(cmd, node, ref, o, ending{until, port, during})
				if err != nil {
					return err
				}
				p = profile.Merge(old, p)
				if out != "" {
					if err := writeProfile(out, p); err != nil {
						return err
					}
				}
				if !push {
					return nil
				}
				return a.makePack(cmd, ref, chain, image, p, "", true)
			})
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	f.StringVar(&until, "until", "", "end when the output has this `TEXT`")
	f.IntVar(&port, "port", 0, "end when something in the container listens on TCP port `N`")
	f.DurationVar(&during, "for", 0, "end after this `TIME`, such as 30s, at the latest")
	f.StringVarP(&out, "output", "o", "", "write the profile to `FILE`")
	f.StringVar(&merge, "merge", "", "an older profile in `FILE` that the run is added to")
	f.BoolVar(&push, "push", false, "make a startup pack and put it beside the image")
	f.StringArrayVarP(&env, "env", "e", nil, "set an environment variable, `NAME=value`")
	f.StringVarP(&o.Dir, "workdir", "w", "", "working `DIR` in the container")
	f.StringVarP(&o.User, "user", "u", "", "`USER[:GROUP]`")
	f.StringArrayVarP(&binds, "volume", "v", nil, "show a file or directory of the host, `SRC:DST[:ro]`")
	cmd.AddCommand(newPackCommand(a), newShowCommand(a), newMergeCommand(), newPushCommand(a))
	return cmd
}

// pushable parses an image's name, and refuses one that is in no registry if something is to be pushed beside it.
func pushable(image string, push bool) (remote.Reference, error) {
	ref, err := parseReference(image)
	if err == nil && push && ref.Kind() != remote.Registry {
		err = &usageError{fmt.Errorf("profile: --push: %v is in no registry, so there is no place beside it: use -o FILE", ref)}
	}
	return ref, err
}

func newPackCommand(a *app) *cobra.Command {
	var file, out string
	var push bool
	cmd := &cobra.Command{
		Use:   "pack --profile FILE [flags] IMAGE",
		Short: "Make a startup pack for an image from a profile",
		Long: `Pack makes the startup pack of IMAGE, which need not be the image that was profiled: files are found by their paths. What it needs of
the image is fetched. -o FILE writes it, --push puts it beside the image into its registry, where it is used from then on.`,
		Example: `  lazuli profile pack --profile app.profile --push registry.example.com/app:2-lazy`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return &usageError{fmt.Errorf("profile pack: %w\nusage: %s", err, cmd.UseLine())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" || out == "" && !push {
				return &usageError{errors.New("profile pack: want --profile FILE, and -o FILE or --push")}
			}
			ref, err := pushable(args[0], push)
			if err != nil {
				return err
			}
			p, err := readProfile(file)
			if err != nil {
				return err
			}
			return a.withRecorder(cmd, func(node *rootfs.Node) (err error) {
				r, err := node.Mount(cmd.Context(), ref, "", rootfs.MountOptions{
					Notice: func(s string) { fmt.Fprintln(printable(cmd.ErrOrStderr()), s) },
				})
				if err != nil {
					return err
				}
				defer func() { err = errors.Join(err, r.Close()) }()
				return a.makePack(cmd, ref, r.Chain(), r.Image, p, out, push)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "profile", "", "the profile's `FILE`")
	f.StringVarP(&out, "output", "o", "", "write the pack to `FILE`")
	f.BoolVar(&push, "push", false, "put it beside the image")
	return cmd
}

// packShare is what share of the runs has to touch a piece for it to be in a pack: at 20 ms and 1 Gbit/s fetching ahead pays from a few
// percent on, and what the merge keeps is above that.
const packShare = 0.05

// withRecorder opens the node for as long as f runs. It is this process also where a daemon runs: a recording needs a mount of
// its own kind.
func (a *app) withRecorder(cmd *cobra.Command, f func(*rootfs.Node) error) (err error) {
	if _, err := bundle.Runtime(); err != nil {
		return err
	}
	node, err := a.open(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	return f(node)
}

// An ending is what ends a recording before the process does. What is zero does not.
type ending struct {
	until  string        // in its output
	port   int           // that something listens on
	during time.Duration // from its beginning
}

// record runs the image and returns the profile of what was read.
func (a *app) record(cmd *cobra.Command, node *rootfs.Node, ref remote.Reference, o bundle.Options, when ending) (p *profile.Profile, chain rootfs.Chain, image *remote.Image, err error) {
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	r, err := node.Mount(ctx, ref, "", rootfs.MountOptions{
		RW: true, Record: true, Notice: func(s string) { fmt.Fprintln(printable(stderr), s) },
	})
	if err != nil {
		return nil, chain, nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	spec, err := bundle.Config(r.Config, r.Dir, o)
	if err != nil {
		return nil, chain, nil, err
	}
	enough, end := context.WithCancelCause(ctx)
	defer end(nil)
	if when.during > 0 {
		timer := time.AfterFunc(when.during, func() { end(errEnough) })
		defer timer.Stop()
	}
	stdio := bundle.IO{Stdin: cmd.InOrStdin(), Stdout: cmd.OutOrStdout(), Stderr: stderr}
	if when.port > 0 {
		stdio.Started = func(pid int) {
			if bundle.Listening(enough, pid, when.port) {
				end(errEnough)
			}
		}
	}
	if when.until != "" {
		w := &watcher{text: []byte(when.until), found: func() { end(errEnough) }}
		stdio.Stdout, stdio.Stderr = io.MultiWriter(stdio.Stdout, w), io.MultiWriter(stdio.Stderr, w)
	}
	code, err := bundle.Run(enough, a.bundles(), spec, stdio)
	switch {
	case errors.Is(context.Cause(enough), errEnough):
		err = nil
	case err != nil:
		return nil, chain, nil, err
	case code != 0:
		return nil, chain, nil, fmt.Errorf("profile %v: the process ended with code %d: nothing is recorded of a start that failed", ref, code)
	case when.until != "":
		return nil, chain, nil, fmt.Errorf("profile %v: the process ended and nothing it printed had %q", ref, when.until)
	case when.port > 0:
		return nil, chain, nil, fmt.Errorf("profile %v: the process ended and nothing listened on port %d", ref, when.port)
	}
	chain = r.Chain()
	p, err = chain.Profile(r.Recorded())
	if err == nil && len(p.Pieces) == 0 {
		err = fmt.Errorf("profile %v: nothing of the image was read", ref)
	}
	if err == nil {
		fmt.Fprintf(stderr, "recorded %d pieces of files\n", len(p.Pieces))
	}
	return p, chain, r.Image, err
}

var errEnough = errors.New("enough is recorded")

// A watcher calls found when a text is written to it.
type watcher struct {
	text  []byte
	found func()

	mu   sync.Mutex
	tail []byte // of what was written, shorter than text
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tail = append(w.tail, p...)
	if bytes.Contains(w.tail, w.text) {
		w.found()
	}
	w.tail = w.tail[max(0, len(w.tail)-len(w.text)+1):]
	return len(p), nil
}

// makePack makes the startup pack of an image, and writes it to the file out unless that is "", or pushes it, or both.
func (a *app) makePack(cmd *cobra.Command, ref remote.Reference, chain rootfs.Chain, image *remote.Image, p *profile.Profile, out string, push bool) error {
	dir := "" // where temporary files are
	if out != "" {
		dir = filepath.Dir(out)
	}
	f, err := os.CreateTemp(dir, "lazuli-pack-")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	report, err := chain.Pack(cmd.Context(), p, packShare, f)
	if err != nil {
		return fmt.Errorf("%v: %w", ref, err)
	}
	reportPack(cmd.ErrOrStderr(), report)
	if push {
		digest, err := convert.PushPack(cmd.Context(), ref, image, f, report.Size, remote.Options{})
		if err != nil {
			return err
		}
		fmt.Fprintln(cmd.OutOrStdout(), digest)
	}
	if out == "" {
		return nil
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return os.Rename(f.Name(), out)
}

func reportPack(w io.Writer, r rootfs.PackReport) {
	fmt.Fprintf(w, "startup pack: %s for %s of files in %d chunks", size(r.Size), size(r.Content), r.Chunks)
	if r.Missing > 0 {
		fmt.Fprintf(w, "; %d files of the profile are not in the image", r.Missing)
	}
	fmt.Fprintln(w)
}

func readProfile(path string) (*profile.Profile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p, err := profile.Parse(f)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return p, err
}

func writeProfile(path string, p *profile.Profile) error {
	var b strings.Builder
	if _, err := p.WriteTo(&b); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(b.String()), 0o644)
}
