package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"lazuli/convert"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
)

func newConvertCommand() *cobra.Command {
	var (
		opts      convert.Options
		format    string
		platforms []string
		chunk     = convertSize(0)
		group     = convertSize(0)
		file      string
		quiet     bool
		asJSON    bool
	)
	cmd := &cobra.Command{
		Use:   "convert SRC DST",
		Short: "Make a lazy image of an ordinary one",
		Long: `Convert reads the image or index SRC and writes a lazy one to DST: its layers become archives that can be
read piece by piece, and everything else stays as it is. Ordinary clients can still pull the result.

SRC and DST are each NAME[:TAG] of a registry (with docker's credentials), oci:DIR[:TAG] or
docker-archive:FILE[:TAG]. Layers that are lazy already are kept. What was converted before is not converted
again: a second run uploads nothing. DST's tag moves last, when everything else is there.

--profile FILE says what a start of the image reads. These files come first in their layers, and the image gets a startup pack of
them, which its manifest names: a node fetches it in one request. Without a profile an image in a registry gets a pack with what its command
needs, as far as that can be seen without running it: its interpreter, libraries and scripts, and the Python modules that they import. It lies
beside the image and gives way to one that was recorded (lazuli profile --push).`,
		Example: `  lazuli convert docker.io/library/python:3.12 registry.example.com/python:3.12-lazy
  lazuli convert oci:./image oci:./lazy
  lazuli convert --platform linux/amd64 --format zstd:chunked python:3.12 docker-archive:python.tar:python:3.12
  lazuli convert --profile start.profile my/app:1 my/app:1-lazy`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			src, err := parseReference(args[0])
			if err != nil {
				return err
			}
			dst, err := parseReference(args[1])
			if err != nil {
				return err
			}
			opts.Format = convert.Format(format)
			opts.ChunkSize, opts.GroupSize = int64(chunk), int64(group)
			for _, s := range platforms {
				p, err := v1.ParsePlatform(s)
				if err != nil {
					return &usageError{fmt.Errorf("--platform %s: want OS/ARCHITECTURE[/VARIANT], such as linux/arm64: %w", s, err)}
				}
				opts.Platforms = append(opts.Platforms, *p)
			}
			if file != "" {
				if opts.Profile, opts.Pieces, err = readPieces(file); err != nil {
					return err
				}
			}
			opts.Progress = new(convert.Progress)
			stop := func() {}
			if !quiet {
				stop = showConverting(cmd.ErrOrStderr(), opts.Progress)
			}
			result, err := convert.Image(cmd.Context(), src, dst, opts)
			stop()
			if err != nil {
				return err
			}
			for _, name := range result.Missed {
				fmt.Fprintf(cmd.ErrOrStderr(), "profile: %s: not moved: no such file in the image, or a layer changes it twice\n", name)
			}
			for _, line := range result.Warnings {
				fmt.Fprintf(printable(cmd.ErrOrStderr()), "warning: %s\n", line)
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), result)
			}
			if !quiet {
				printConverted(cmd.OutOrStdout(), dst, result)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&format, "format", string(convert.EStargz), "format of the layers: estargz or zstd:chunked")
	f.StringSliceVar(&platforms, "platform", nil, "take only these images of an index, such as linux/amd64 (default all)")
	f.IntVar(&opts.Level, "level", 0, "level of compression (default: see docs/convert.md)")
	f.Var(&chunk, "chunk-size", "largest piece of a file that is verified by itself, such as 128KiB (default: see docs/convert.md)")
	f.Var(&group, "group-size", "bytes of small files that are fetched together; 1 is each file alone (default: see docs/convert.md)")
	f.StringVar(&file, "profile", "", "`FILE` with what a start reads: a profile of lazuli profile, or names of files, one in each line")
	f.BoolVar(&opts.NoPack, "no-pack", false, "make no startup packs")
	f.StringVar(&opts.Cache, "cache", defaultConvertCache(), "`DIR` that remembers what was converted; empty for none")
	f.StringVar(&opts.TempDir, "temp-dir", "", "`DIR` for layers on their way (default the system's)")
	f.BoolVar(&opts.Remote.PlainHTTP, "plain-http", false, "speak to registries without TLS")
	f.BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	f.BoolVar(&asJSON, "json", false, "print the result as JSON")
	cmd.RegisterFlagCompletionFunc("format", cobra.FixedCompletions([]string{string(convert.EStargz), string(convert.ZstdChunked)}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// readPieces returns the names in a profile and, if it says which pieces of the files are read, those.
func readPieces(path string) ([]string, *profile.Profile, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	names, err := convert.ParseProfile(bytes.NewReader(text))
	var pieces *profile.Profile
	if err == nil && bytes.Contains(text, []byte(`"piece"`)) {
		pieces, err = profile.Parse(bytes.NewReader(text))
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return names, pieces, err
}

func defaultConvertCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "lazuli", "convert")
}

// convertSize is a flag of bytes, written as 65536, 64K, 64KiB or 1MiB.
type convertSize int64

func (s *convertSize) String() string { return "" }
func (s *convertSize) Type() string   { return "size" }
func (s *convertSize) Set(text string) error {
	n, unit := int64(0), ""
	if _, err := fmt.Sscanf(text+" ", "%d%s ", &n, &unit); err != nil && n == 0 {
		return fmt.Errorf("want a number of bytes, such as 65536 or 64KiB")
	}
	shift, ok := map[string]int{"": 0, "b": 0, "k": 10, "kib": 10, "m": 20, "mib": 20}[strings.ToLower(unit)]
	if !ok || n < 0 || n > 1<<40>>shift {
		return fmt.Errorf("want a number of bytes, such as 65536 or 64KiB")
	}
	*s = convertSize(n << shift)
	return nil
}

func printConverted(w io.Writer, dst remote.Reference, r *convert.Result) {
	var in, out int64
	for _, l := range r.Layers {
		fmt.Fprintf(w, "%-9s  %s → %s  %s → %s\n", l.Outcome, convertShort(l.Source), convertShort(l.Target), size(l.SourceSize), size(l.TargetSize))
		in, out = in+l.SourceSize, out+l.TargetSize
	}
	ratio := ""
	if in > 0 {
		ratio = fmt.Sprintf(" (%.1f %%)", 100*float64(out)/float64(in))
	}
	for _, p := range r.Packs {
		of := "what the command needs"
		if !strings.HasPrefix(p.Origin, "closure") {
			of = "the profile"
		}
		fmt.Fprintf(w, "startup pack of %s  %s, %s of files in %d chunks\n", of, size(p.Size), size(p.Content), p.Chunks)
	}
	fmt.Fprintf(w, "%v\n%v  %s → %s%s, %s written\n", dst, r.Digest, size(in), size(out), ratio, size(r.Uploaded))
}

func convertShort(h v1.Hash) string { return h.Hex[:min(12, len(h.Hex))] }

// showConverting shows how far p is until stop is called: one line that is rewritten on a terminal, a line every
// few seconds elsewhere.
func showConverting(w io.Writer, p *convert.Progress) (stop func()) {
	f, ok := w.(*os.File)
	tty := ok && term.IsTerminal(int(f.Fd()))
	every := 5 * time.Second
	if tty {
		every = 200 * time.Millisecond
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		t := time.NewTicker(every)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				if tty {
					fmt.Fprint(w, "\r\x1b[K")
				}
				return
			case <-t.C:
			}
			line := convertingLine(p.Status())
			if !tty {
				fmt.Fprintln(w, line)
				continue
			}
			if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 && len(line) >= width {
				line = line[:width-1]
			}
			fmt.Fprint(w, "\r"+line+"\x1b[K")
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

func convertingLine(s convert.Status) string {
	if s.Layers == 0 {
		return "reading manifests"
	}
	line := fmt.Sprintf("%d of %d layers, %s of %s read, %s made, %.1f MB/s", s.LayersDone, s.Layers, size(s.In), size(s.Total), size(s.Out), s.Rate/1e6)
	if s.Left > 0 {
		line += fmt.Sprintf(", about %v left", s.Left.Round(time.Second))
	}
	return line
}
