package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"lazuli/cmd/lazuli/internal/daemon"
)

func newStatusCommand(a *app) *cobra.Command {
	var asJSON, verify bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say what the daemon does",
		Long: `Status says whether a daemon runs, what is mounted, how much of each image is here, what is being fetched, and what went wrong.
The exit code is 1 if no daemon answers, or if an image was found to lie about a layer.

--verify has every lazy layer of containerd's images read from beginning to end first, and compared with what its image claims; the
daemon does that by itself for layers that have arrived whole.`,
		Example: `  lazuli status
  lazuli status --json
  lazuli status --verify`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			client := daemon.Dial(a.Socket)
			if client == nil {
				if os.Geteuid() != 0 {
					return errors.New("only root may ask the daemon: run it with sudo")
				}
				return fmt.Errorf("no daemon answers at %s: systemctl start lazuli, or run lazuli daemon", a.Socket)
			}
			if verify {
				if err := client.Verify(cmd.Context()); err != nil {
					return err
				}
			}
			s, err := client.Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), s)
			} else {
				err = printStatus(printable(cmd.OutOrStdout()), s)
			}
			if err == nil && len(s.Bad) > 0 {
				err = errors.New("an image lies about its layers, see above: remove it")
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&verify, "verify", false, "verify all lazy layers first, which fetches all of them")
	return cmd
}

func printStatus(out io.Writer, s daemon.Status) error {
	fmt.Fprintf(out, "daemon   %s, keeper %d, server %d since %s\n", s.Version, s.Keeper, s.Server, s.Since.Local().Format(time.DateTime))
	fmt.Fprintf(out, "store    %s of %s, in %s\n", size(s.Store.Size), size(s.Store.Limit), s.Root)
	fmt.Fprintf(out, "fetched  %s in %d requests; %s needed by %d reads that waited, %d failed\n",
		size(s.Fetched.Fetched), s.Fetched.Requests, size(s.Fetched.Needed), s.Fetched.Misses, s.Fetched.Errors)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	section := func(n int, header string) bool {
		if n > 0 {
			fmt.Fprintf(w, "\n%s\n", header)
		}
		return n > 0
	}
	if section(len(s.Images), "IMAGE\tDIGEST\tHERE\tLAZY LAYERS\tBY\t") {
		for _, im := range s.Images {
			lazy := 0
			for _, l := range im.Layers {
				if l.Lazy {
					lazy++
				}
			}
			fmt.Fprintf(w, "%s\t%s\t%s of %s\t%d of %d\t%s\t\n", im.Reference, shortDigest(im.Digest), size(im.BytesHere), size(im.Bytes), lazy, len(im.Layers), holder(im))
		}
	}
	if section(len(s.Snapshot)+len(s.Mounts), "MOUNTED\tFOR\t") {
		for _, m := range s.Snapshot {
			note := ""
			if !m.Served {
				note = " (the connection to the kernel was lost: what is not here cannot be read; start the container again)"
			}
			fmt.Fprintf(w, "%s\t%s%s\t\n", m.Dir, m.Key, note)
		}
		for _, m := range s.Mounts {
			who := "lazuli mount"
			if m.PID != 0 {
				who = fmt.Sprintf("process %d", m.PID)
			}
			fmt.Fprintf(w, "%s\t%s, %s\t\n", m.Dir, m.Reference, who)
		}
	}
	if section(len(s.Fetching), "FETCHING\tPIECES\tFOR\t") {
		for _, f := range s.Fetching {
			whom := "later"
			if f.Waiting {
				whom = "a read that waits"
			}
			fmt.Fprintf(w, "%s\t%d\t%s\t\n", f.Layer, f.Members, whom)
		}
	}
	if section(len(s.Fallback), "NOT LAZY\tLAYER\tWHY\t") {
		for _, f := range s.Fallback {
			fmt.Fprintf(w, "%s\t%s\t%s\t\n", f.Image, shortDigest(f.Layer), f.Why)
		}
	}
	if section(len(s.Bad), "LIES\tLAYER\tWHY\t") {
		for _, b := range s.Bad {
			fmt.Fprintf(w, "%s\t%s\t%s\t\n", b.Image, shortDigest(b.Layer), b.Why)
		}
	}
	return w.Flush()
}
