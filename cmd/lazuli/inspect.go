package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"lazuli/fs/rootfs"
)

func newInspectCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "inspect IMAGE",
		Short: "Say what an image is like, and which of its layers are lazy",
		Long: `Inspect fetches the manifest, the config and the tables of contents of IMAGE, and prints of each layer its format, its
size and that of its table of contents, its entries, how much a start would fetch first, and if it is not lazy, why not.`,
		Example: `  lazuli inspect localhost:5000/python:lazy
  lazuli inspect --json oci:./lazy`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := parseReference(args[0])
			if err != nil {
				return err
			}
			report, err := rootfs.Inspect(cmd.Context(), ref, rootfs.InspectOptions{Hosts: a.HostsDir})
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), report)
			}
			return printReport(printable(cmd.OutOrStdout()), report)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newCheckCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check IMAGE",
		Short: "Fetch all of an image and verify it",
		Long: `Check fetches everything of IMAGE and compares it with what its manifest promises: the digest of every blob, every diffID,
every table of contents, every chunk of every file. It says what is wrong and where. The exit code is 0 if nothing is.`,
		Example: `  lazuli check localhost:5000/python:lazy
  lazuli check --json oci:./lazy`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref, err := parseReference(args[0])
			if err != nil {
				return err
			}
			c := count(cmd.ErrOrStderr(), fmt.Sprintf("%v: checking", ref))
			report, err := rootfs.Check(cmd.Context(), ref, rootfs.InspectOptions{Hosts: a.HostsDir, Progress: c.add})
			c.stop()
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				if err := writeJSON(out, report); err != nil {
					return err
				}
			} else {
				out := printable(out)
				for _, l := range report.Layers {
					state := "ok"
					if n := len(l.Problems); n > 0 {
						state = fmt.Sprintf("%d wrong", n)
					}
					fmt.Fprintf(out, "%-8s %s  %s, %s, %d chunks checked\n", state, l.Digest, l.Format, size(l.Size), l.Checked)
					for _, p := range l.Problems {
						fmt.Fprintf(out, "%-8s %s\n", "", p)
					}
				}
			}
			if n := report.Problems(); n > 0 {
				things := "things are"
				if n == 1 {
					things = "thing is"
				}
				return &exitError{1, fmt.Errorf("%v: %d %s not what the manifest promises: push or convert it again", ref, n, things)}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printReport(out io.Writer, r *rootfs.Report) error {
	fmt.Fprintf(out, "%s\n%s  %s\n", r.Reference, r.Digest, r.MediaType)
	if c := r.Config; c != nil {
		fmt.Fprintf(out, "%s  user %q  entrypoint %q  command %q\n", c.Platform(), c.Config.User, c.Config.Entrypoint, c.Config.Cmd)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nLAYER\tFORMAT\tSIZE\tTOC\tENTRIES\tFILES\tFIRST")
	var blobs, files, first int64
	lazy := 0
	for _, l := range r.Layers {
		blobs, files, first = blobs+l.Size, files+l.FileBytes, first+l.Prefetch+l.TOCSize
		dash := func(s string) string {
			if !l.Lazy {
				return "-"
			}
			return s
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", shortDigest(l.Digest), l.Format, size(l.Size), dash(size(l.TOCSize)),
			dash(fmt.Sprint(l.Entries)), dash(size(l.FileBytes)), dash(size(l.Prefetch)))
		if l.Lazy {
			lazy++
		} else {
			first += l.Size
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, l := range r.Layers {
		if !l.Lazy {
			fmt.Fprintf(out, "%s is not lazy: %s\n", shortDigest(l.Digest), l.Why)
		}
	}
	_, err := fmt.Fprintf(out, "\n%d of %d layers are lazy; of %s a start fetches %s first\n", lazy, len(r.Layers), size(blobs), size(first))
	return err
}

// shortDigest is as much of a digest as people compare.
func shortDigest(d string) string {
	d = strings.TrimPrefix(d, "sha256:")
	return d[:min(12, len(d))]
}
